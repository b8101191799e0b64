// The console's own script: dialogues, sliders, files to push, charts. htmx does the rest.
// No script is written into pages, and text of others is only ever set as text.
"use strict";

const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const one = (selector, within = document) => within.querySelector(selector);

// --- dialogues and notices -------------------------------------------------------------------------------

document.addEventListener("htmx:afterSwap", (event) => {
  if (event.target.id === "dialog-body") one("#dialog").showModal();
});

document.addEventListener("htmx:afterRequest", (event) => {
  const { requestConfig, successful } = event.detail;
  if (requestConfig.verb !== "post") return;
  one("#dialog").close();
  const notice = one("#notice");
  if (notice.textContent.trim()) notice.scrollIntoView({ block: "nearest" });
  if (document.activeElement === document.body) notice.focus({ preventScroll: true }); // what had it is gone
  if (successful && requestConfig.elt.matches("[data-push]")) chosen([]);
});

document.addEventListener("htmx:beforeRequest", (event) => {
  if (event.detail.requestConfig.verb === "post") one("#notice").replaceChildren();
});

document.addEventListener("htmx:sendError", (event) => {
  if (event.detail.requestConfig.verb === "post") say("The registry does not answer.");
});

document.addEventListener("click", (event) => {
  const link = event.target.closest("[data-reload]");
  if (!link) return;
  event.preventDefault();
  location.reload();
});

function say(text) {
  const said = document.createElement("p");
  said.className = "notice bad";
  said.textContent = text;
  one("#notice").replaceChildren(said);
}

// --- split sliders: always 100 together ------------------------------------------------------------------

function divide(form, moved) {
  const others = all("input[type=range]", form).filter((slider) => slider !== moved);
  const left = 100 - moved.valueAsNumber;
  const sum = others.reduce((total, slider) => total + Number(slider.dataset.before), 0);
  const exact = others.map((slider) => (left * (sum ? Number(slider.dataset.before) / sum : 1 / others.length)));
  const whole = exact.map(Math.floor);
  const short = left - whole.reduce((total, value) => total + value, 0);
  const next = [...exact.keys()].sort((a, b) => exact[b] - whole[b] - (exact[a] - whole[a]));
  for (const index of next.slice(0, short)) whole[index] += 1;
  others.forEach((slider, index) => { slider.value = whole[index]; });
  for (const slider of all("input[type=range]", form)) {
    slider.setAttribute("aria-valuetext", `${slider.value} percent`);
    slider.parentElement.querySelector("output").textContent = `${slider.value} %`;
  }
  one("[data-apply]", form).disabled = false;
}

// While one is moved, the others share what is left as they shared it before.
document.addEventListener("input", (event) => {
  const form = event.target.closest("[data-sliders]");
  if (!form || event.target.type !== "range") return;
  if (form.dataset.moving !== event.target.id) {
    form.dataset.moving = event.target.id;
    for (const slider of all("input[type=range]", form)) slider.dataset.before = slider.dataset.now ?? slider.getAttribute("value");
  }
  divide(form, event.target);
  for (const slider of all("input[type=range]", form)) slider.dataset.now = slider.value;
});

// --- files to push ---------------------------------------------------------------------------------------

function chosen(files) {
  const form = one("[data-push]");
  const input = one("#files", form);
  const kept = new DataTransfer();
  for (const file of files) if (!file.name.startsWith(".")) kept.items.add(file);
  input.files = kept.files;
  listed(form);
}

function listed(form) {
  const files = [...one("#files", form).files];
  const lines = files.map((file) => {
    const line = document.createElement("li");
    line.textContent = `${file.name}, ${(file.size / 1024).toFixed(1)} KiB`;
    return line;
  });
  one("[data-list]", form).replaceChildren(...lines);
  one("button", form).disabled = !files.length;
}

async function filesOf(entry) {
  if (entry.isFile) return [await new Promise((got, failed) => entry.file(got, failed))];
  const reader = entry.createReader();
  const found = [];
  for (;;) {
    const some = await new Promise((got, failed) => reader.readEntries(got, failed));
    if (!some.length) break;
    for (const each of some) if (each.isFile) found.push(...await filesOf(each));
  }
  return found;
}

for (const drop of all("[data-drop]")) {
  const form = drop.closest("form");
  for (const kind of ["dragenter", "dragover"]) {
    drop.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
  }
  drop.addEventListener("dragleave", (event) => { if (!drop.contains(event.relatedTarget)) drop.classList.remove("over"); });
  drop.addEventListener("drop", async (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    const items = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
    const files = items.length ? (await Promise.all(items.map(filesOf))).flat() : [...event.dataTransfer.files];
    chosen(files);
  });
  one("#files", form).addEventListener("change", () => listed(form));
  form.addEventListener("htmx:configRequest", (event) => {
    event.detail.path += `?task=${encodeURIComponent(one("#task").value.trim())}`;
  });
  form.addEventListener("htmx:beforeRequest", (event) => {
    one("#pushed").replaceChildren();
    if (one("#task").value.trim()) return;
    event.preventDefault();
    one("#task").reportValidity();
  });
  const sent = one("progress", form);
  form.addEventListener("htmx:xhr:progress", (event) => {
    sent.hidden = false;
    sent.value = event.detail.lengthComputable ? event.detail.loaded / event.detail.total : 0;
  });
  form.addEventListener("htmx:afterRequest", () => { sent.hidden = true; });
}

// --- charts ----------------------------------------------------------------------------------------------

const REFRESH_MS = 10_000;
const plots = new Map();

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = (number) => css(number < 0 ? "--bad" : `--c${number}`);
const clock = (at) => new Date(1000 * at).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hour12: false });

function shown(value, unit) {
  if (value == null) return "–";
  if (unit === "s") return value < 1 ? `${Math.round(1000 * value)} ms` : `${value.toFixed(1)} s`;
  return `${value >= 100 ? Math.round(value) : Number(value.toFixed(2))}${unit === "%" ? " %" : ""}`;
}

function options(figure, lines, width) {
  const unit = figure.dataset.unit;
  const axis = { stroke: css("--muted"), grid: { stroke: css("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui" };
  return {
    width,
    height: 190,
    padding: [8, 20, 0, 0],
    cursor: { points: { size: 6 }, drag: { x: false, y: false } },
    scales: { x: { time: true }, y: { range: (_, low, high) => [0, unit === "%" ? 100 : Math.max(high, unit === "s" ? 0.01 : 1) * 1.1] } },
    axes: [
      { ...axis, size: 28, values: (_, times) => times.map(clock), space: 60 },
      { ...axis, size: 58, values: (_, values) => values.map((value) => shown(value, unit)) },
    ],
    series: [
      { label: "at", value: (_, at) => (at == null ? "–" : clock(at)) },
      ...lines.map((line) => ({
        label: line.label,
        stroke: colour(line.colour),
        width: 2,
        dash: line.dashed ? [4, 4] : undefined,
        spanGaps: unit !== "/s",
        points: { show: unit === "%" },
        value: (_, value) => shown(value, unit),
      })),
    ],
  };
}

function draw(figure, times, lines) {
  const place = one(".plot", figure);
  const key = JSON.stringify([lines.map((line) => [line.label, line.colour]), place.clientWidth]);
  const known = plots.get(figure);
  const data = [times, ...lines.map((line) => line.values)];
  figure.classList.toggle("empty", !lines.some((line) => line.values.some((value) => value)));
  if (known?.key === key) {
    known.plot.setData(data);
    return;
  }
  known?.plot.destroy();
  plots.set(figure, { key, plot: new uPlot(options(figure, lines, place.clientWidth), data, place), times, lines });
}

async function refresh(section) {
  const minutes = one("input[name=minutes]:checked", section).value;
  const address = `${section.dataset.src}${section.dataset.src.includes("?") ? "&" : "?"}minutes=${minutes}`;
  let found;
  try {
    const answer = await fetch(address, { headers: { "hx-request": "true" } });
    if (!answer.ok) return;
    found = await answer.json();
  } catch {
    return; // it is away; the next time
  }
  for (const figure of all("[data-chart]", section)) draw(figure, found.times, found[figure.dataset.chart]);
}

function again() {
  for (const [, known] of plots) known.plot.destroy();
  plots.clear();
  for (const section of all("[data-src]")) refresh(section);
}

for (const section of all("[data-src]")) {
  section.addEventListener("change", () => refresh(section));
  refresh(section);
  setInterval(() => { if (!document.hidden) refresh(section); }, REFRESH_MS);
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === width) return; // a phone's bars come and go
  width = innerWidth;
  again();
});
