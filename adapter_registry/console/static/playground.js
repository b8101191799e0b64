// The playground: one prompt, or a file of them, under two versions. Uses what console.js begins with.
"use strict";

function events(text) {
  return text.split("\n").filter((line) => line.startsWith("data: ") && line !== "data: [DONE]").map((line) => JSON.parse(line.slice(6)));
}

async function asked(address, question, signal) {
  const headers = { "content-type": "application/json", "hx-request": "true" };
  const got = await fetch(address, { method: "POST", signal, headers, body: JSON.stringify(question) });
  if (got.ok) return { got };
  const said = await got.text();
  if (got.headers.has("hx-redirect")) location.href = got.headers.get("hx-redirect");
  try {
    return { got, refusal: JSON.parse(said).error.message };
  } catch { // a refusal of the console's own
    return { got, refusal: new DOMParser().parseFromString(said, "text/html").body.textContent.trim() };
  }
}

async function answer(section, address, question, signal) {
  const text = one("[data-text]", section);
  const figures = one("[data-figures]", section);
  one("[data-name]", section).textContent = question.model;
  text.replaceChildren();
  text.classList.remove("bad");
  figures.textContent = "…";
  const began = performance.now();
  let first = 0;
  let tokens = 0;
  const failed = (message) => { text.textContent += message; text.classList.add("bad"); };
  try {
    const { got, refusal } = await asked(address, question, signal);
    if (refusal !== undefined) {
      figures.textContent = `refused: ${got.status}`;
      failed(refusal);
      return;
    }
    const version = got.headers.get("x-prad-version");
    if (version) one("[data-name]", section).textContent = `${got.headers.get("x-prad-task")}@${version}`;
    const reader = got.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const event of parts.flatMap(events)) {
        first ||= performance.now();
        if (event.error) failed(event.error.message);
        text.append(event.choices?.[0]?.text ?? "");
        tokens = event.usage?.completion_tokens ?? tokens;
      }
    }
    const ended = performance.now();
    figures.textContent = `${tokens} tokens · first after ${Math.round(first - began)} ms · all after ${Math.round(ended - began)} ms`;
  } catch (error) {
    figures.textContent = signal.aborted ? "stopped" : "";
    if (!signal.aborted) failed("The registry does not answer.");
  }
}

// Over a file both are asked greedily, a few prompts at once; where they answer otherwise, it is shown.

const MOST_LINES = 1000;
const MOST_SHOWN = 200;
const AT_ONCE = 3; // of two answers each: the registry passes on eight

function linesOf(text) {
  const lines = text.split("\n").map((line, index) => [line.trim(), index + 1]).filter(([line]) => line);
  if (!lines.length) throw new Error("The file holds no prompts.");
  if (lines.length > MOST_LINES) throw new Error(`The file has ${lines.length} prompts; up to ${MOST_LINES} are asked from here: prad adapter diff asks more.`);
  return lines.map(([line, number]) => {
    let found = {};
    try { found = JSON.parse(line); } catch { /* said below */ }
    const right = found?.completion ?? null;
    if (typeof found?.prompt === "string" && found.prompt && (right === null || typeof right === "string")) return { prompt: found.prompt, right };
    throw new Error(`Line ${number}: expected {"prompt": text}, with "completion": text if there is a right answer.`);
  });
}

async function whole(address, question, signal) {
  for (;;) {
    const { got, refusal } = await asked(address, question, signal);
    if (got.status === 429) {
      await new Promise((done) => setTimeout(done, 500));
      signal.throwIfAborted();
      continue;
    }
    if (refusal !== undefined) throw new Error(`${question.model}: ${refusal}`);
    const found = (await got.text()).split("\n\n").flatMap(events);
    const failed = found.find((event) => event.error);
    if (failed) throw new Error(`${question.model}: ${failed.error.message}`);
    return found.map((event) => event.choices?.[0]?.text ?? "").join("");
  }
}

function showChanged(body, labels, texts) {
  const row = document.createElement("tr");
  row.append(...texts.map((text, index) => {
    const cell = document.createElement(index ? "td" : "th");
    cell.textContent = text.length > 500 ? `${text.slice(0, 500)}…` : text;
    if (index) cell.dataset.label = labels[index - 1];
    return cell;
  }));
  body.append(row);
}

async function compare(section, form, models, rest, lines, signal) {
  const [summary, bar, body] = ["[data-summary]", "progress", "tbody"].map((each) => one(each, section));
  const labels = [...models, "right"];
  body.replaceChildren();
  section.hidden = false;
  models.forEach((model, index) => { one(`[data-name=${"ab"[index]}]`, section).textContent = model; });
  const scored = lines.every((line) => line.right !== null);
  let done = 0;
  let alike = 0;
  const right = [0, 0];
  const told = () => {
    const scores = scored ? `; right: ${models.map((model, index) => `${model} ${Math.round((1000 * right[index]) / done) / 10} %`).join(", ")}` : "";
    summary.textContent = `${done} of ${lines.length} prompts, ${Math.round((1000 * alike) / done) / 10} % answered alike${scores}`;
    bar.value = done / lines.length;
  };
  const left = lines.values();
  const worker = async () => {
    for (const line of left) {
      const texts = await Promise.all(models.map((model) => whole(form.dataset.ask, { ...rest, prompt: line.prompt, model, temperature: 0 }, signal)));
      done += 1;
      texts.forEach((text, index) => { right[index] += text.trim() === line.right?.trim(); });
      if (texts[0] === texts[1]) alike += 1;
      else if (body.children.length < MOST_SHOWN) showChanged(body, labels, [line.prompt, ...texts, line.right ?? "–"]);
      told();
    }
  };
  try {
    await Promise.all(Array.from({ length: AT_ONCE }, worker));
  } catch (error) {
    const name = signal.aborted ? "stopped" : error.message;
    summary.textContent = done ? `${summary.textContent}; ${name}` : name;
    throw error;
  }
}

for (const form of all("[data-ask]")) {
  const file = one("#prompts", form);
  file.addEventListener("change", () => { one("#prompt", form).required = !file.files.length; });
  const comparison = one("[data-comparison]");
  const stop = one("[data-stop]", form);
  let running = null;
  stop.addEventListener("click", () => running?.abort());
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    running?.abort();
    const control = running = new AbortController();
    const given = new FormData(form);
    const number = (name) => (given.get(name) === "" ? null : Number(given.get(name)));
    const rest = { prompt: given.get("prompt"), max_tokens: number("max_tokens"), temperature: number("temperature"), key: given.get("key") };
    const sides = ["a", "b"].filter((side) => given.get(side).trim());
    for (const section of all("[data-answer]")) section.hidden = file.files.length || !sides.includes(section.dataset.answer);
    comparison.hidden = true;
    one("#notice").replaceChildren();
    stop.disabled = false;
    if (file.files.length) {
      try {
        if (sides.length < 2) throw new Error("A file is asked under two: name both.");
        await compare(comparison, form, sides.map((side) => given.get(side).trim()), rest, linesOf(await file.files[0].text()), control.signal);
      } catch (error) {
        if (!control.signal.aborted) say(error.message);
        control.abort(); // what the others still ask
      }
      if (running === control) stop.disabled = true;
      return;
    }
    await Promise.all(sides.map((side) => answer(one(`[data-answer=${side}]`), form.dataset.ask, { ...rest, model: given.get(side).trim() }, control.signal)));
    if (running === control) stop.disabled = true;
  });
}
