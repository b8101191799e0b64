"""The console in a real Chromium, as people use it: by mouse and keyboard, at a desk and on a phone."""

from playwright.sync_api import expect

from adapter_registry.client import RegistryClient
from adapter_registry.keys import NewKey, Role
from adapter_registry.messages import TIMES
from adapter_registry.secret import ensure_secret
from adapter_registry.settings import RegistrySettings
from adapter_registry.traffic import SLOT_S, LiveTraffic
from tests.registry.conftest import DESK, PHONE

PAGES = ("/", "/tasks/support", "/replicas", "/log", "/log/keys", "/push", "/playground", "/keys")


def routing(registry):
    return registry.client.task("support").routing


def test_every_page_fits_a_phone_and_a_desk_in_light_and_dark(support, open_console):
    times = [0] * (len(TIMES) + 1)
    long = "a-task-with-quite-a-long-name-that-somebody-chose-0123456789"
    support.client.create_key(NewKey(name="alice-with-a-long-name-0123456789", tasks=("support", long)))
    support.client.split("support", {1: 70, 2: 30})
    support.client.alias("support", "canary", 2)
    answered = {"task": "support", "version": 1, "requests": 3, "failed": 0, "tokens": 9}
    answered |= {"first_token": times, "duration": times}
    support.http.post("/v1/traffic", json={"versions": [answered]})
    support.http.get(
        "/v1/changes", params={"after": -1, "replica": "prefill-0123456789-0123456789-0123456789"}
    )
    for viewport in (DESK, PHONE):
        for scheme in ("light", "dark"):
            console = open_console(support.url, viewport, color_scheme=scheme)
            for path in PAGES:
                console.go(path)
                expect(console.page.locator("h1")).to_be_visible()
                wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
                assert console.page.evaluate(wide) <= 0, (path, viewport)
            ground = console.page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, ground[4:-1].split(","))) < 300) == (scheme == "dark")


def test_every_control_has_a_name(console):
    for path in PAGES:
        console.go(path)
        nameless = console.page.evaluate(
            """() => [...document.querySelectorAll('a, button, input:not([type=hidden]), select, textarea')]
              .filter((each) => !(each.labels?.length || each.textContent.trim() || each.ariaLabel))
              .map((each) => each.outerHTML)"""
        )
        assert nameless == [], path
        assert console.page.locator("h1").count() == 1


def test_sliders_are_always_100_together_and_set_the_split(support, console):
    console.go("/tasks/support")
    page = console.page
    apply = page.get_by_role("button", name="Set this split")
    expect(apply).to_be_disabled()
    second = page.get_by_label("@2", exact=True)
    second.focus()
    for _ in range(7):
        second.press("ArrowRight")
    values = page.locator("input[type=range]").evaluate_all("all => all.map(each => each.valueAsNumber)")
    assert values == [7, 93]
    expect(page.locator("output").first).to_have_text("7 %")
    apply.click()
    expect(page.locator("#notice")).to_contain_text("support now means 1=93 2=7")
    assert routing(support).split == {1: 93, 2: 7}
    expect(page.locator("svg.bar").first).to_have_attribute(
        "aria-label", "version 1: 93.0 percent, version 2: 7.0 percent"
    )


def test_a_double_click_asks_once(support, console):
    console.go("/tasks/support")
    page = console.page
    page.get_by_label("@2", exact=True).press("ArrowRight")
    page.get_by_role("button", name="Set this split").dblclick()
    expect(page.locator("#notice")).to_contain_text("support now means 1=99 2=1")
    page.get_by_role("button", name="Roll back …").click()
    page.get_by_role("dialog").get_by_role("button", name="Roll back", exact=True).dblclick()
    expect(page.locator("#notice")).to_contain_text("support now means 1=100")
    assert [line.event for line in support.client.history("support").events].count("rollback") == 1


def test_three_sliders_share_what_is_left_as_before(support, adapter, console):
    support.verified(adapter(3))
    support.client.split("support", {1: 60, 2: 30, 3: 10})
    console.go("/tasks/support")
    page = console.page
    for expected in ([40, 20, 40], [100, 0, 0], [0, 33, 67], [10, 30, 60]):
        page.get_by_label("@3", exact=True).fill(str(expected[0]))
        found = page.locator("input[type=range]").evaluate_all("all => all.map(each => each.valueAsNumber)")
        assert found == expected


def test_promote_and_roll_back_after_a_look_at_the_evidence(support, console):
    console.go("/tasks/support")
    page = console.page
    page.get_by_role("button", name="Promote …").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("prad adapter diff support@1 support@2 --data FILE")
    dialog.get_by_role("button", name="Leave it").click()
    expect(dialog).to_be_hidden()
    assert routing(support).split == {1: 100}
    page.get_by_role("button", name="Promote …").press("Enter")
    dialog.get_by_role("button", name="Promote support@2").click()
    expect(page.locator("#notice")).to_contain_text("support now means 2=100")
    expect(dialog).to_be_hidden()
    assert routing(support).split == {2: 100}
    page.get_by_role("button", name="Roll back …").click()
    expect(dialog).to_contain_text("1=100")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    page.get_by_role("button", name="Roll back …").click()
    dialog.get_by_role("button", name="Roll back", exact=True).click()
    expect(page.locator("#notice")).to_contain_text("support now means 1=100")
    assert routing(support).split == {1: 100}


def test_the_slower_operator_is_told_and_overwrites_nothing(support, open_console):
    ada, bob = open_console(support.url), open_console(support.url)
    for each in (ada, bob):
        each.go("/tasks/support")
        each.page.get_by_role("button", name="Promote …").click()
    ada.page.get_by_role("button", name="Promote support@2").click()
    expect(ada.page.locator("#notice")).to_contain_text("support now means 2=100")
    support.client.alias("support", "canary", 1)
    bob.page.get_by_role("button", name="Promote support@2").click()
    expect(bob.page.locator("#notice")).to_contain_text("somebody changed it meanwhile")
    assert routing(support).aliases == {"canary": 1}
    bob.page.locator("#notice").get_by_role("link", name="Show the routing as it is now").click()
    expect(bob.page.get_by_role("cell", name="support@canary")).to_be_visible()


def test_a_change_by_others_shows_itself(support, console):
    console.go("/tasks/support")
    support.client.split("support", {1: 50, 2: 50})
    expect(console.page.get_by_text("The routing changed meanwhile")).to_be_visible()


def drop(page, folder):
    """What a file manager does, with plain files."""
    given = [[path.name, list(path.read_bytes())] for path in sorted(folder.iterdir())]
    moved = page.evaluate_handle(
        """given => { const moved = new DataTransfer();
          for (const [name, bytes] of given) moved.items.add(new File([new Uint8Array(bytes)], name));
          return moved; }""",
        given,
    )
    for kind in ("dragenter", "dragover", "drop"):
        page.dispatch_event("[data-drop]", kind, {"dataTransfer": moved})


def test_an_adapter_is_pushed_by_drag_and_drop(registry, adapter, open_console, tmp_path):
    console = open_console(registry.url)
    page = console.page
    console.go("/push?task=support")
    drop(page, adapter(1))
    expect(page.locator("[data-list] li")).to_have_count(2)
    page.get_by_role("button", name="Push").click()
    expect(page.locator("#pushed")).to_contain_text("Pushed as support@1")
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "weights.pkl").write_bytes(b"x")
    drop(page, wrong)
    page.get_by_role("button", name="Push").click()
    expect(page.locator("#notice")).to_contain_text("an adapter has no file 'weights.pkl'")
    page.locator("#files").set_input_files([str(path) for path in adapter(2).iterdir()])
    page.get_by_role("button", name="Push").click()
    expect(page.locator("#pushed")).to_contain_text("Pushed as support@2")
    page.get_by_role("link", name="Go to support").click()
    expect(page.get_by_role("heading", name="support", exact=True)).to_be_visible()


def test_charts_are_drawn_and_go_on(support, open_console, monkeypatch):
    now = [1_000_000.0]
    monkeypatch.setattr(LiveTraffic, "now", lambda _: now[0])
    monkeypatch.setattr(LiveTraffic, "_now", lambda _: int(now[0]) // SLOT_S)
    times = [0] * (len(TIMES) + 1)
    times[5] = 30
    answered = {"task": "support", "version": 1, "requests": 30, "failed": 0, "tokens": 90}
    answered |= {"first_token": times, "duration": times}
    support.http.post("/v1/traffic", json={"versions": [answered]})
    now[0] += SLOT_S
    console = open_console(support.url)
    console.go("/tasks/support")
    page = console.page
    requests = page.locator("[data-chart=requests]")
    expect(requests.locator("canvas")).to_be_visible()
    expect(requests.locator(".u-legend")).to_contain_text("@1")
    page.get_by_label("1 h").check()
    expect(page.locator("[data-chart=agreement].empty")).to_be_visible()
    assert requests.locator("canvas").count() == 1


def test_signing_in_and_a_key_shown_once(serving, data_dir, tmp_path, open_console):
    files = {"replica_secret_file": tmp_path / "replicas", "admin_token_file": tmp_path / "admin"}
    with serving(RegistrySettings(port=0, data_dir=data_dir, log_level="warning", **files)) as registry:
        admin = ensure_secret(tmp_path / "admin")
        with RegistryClient(registry.url, token=admin) as client:
            client.create_key(NewKey(name="reader", role=Role.READ))
        console = open_console(registry.url)
        page = console.page
        console.go("/keys")
        page.get_by_label("Token").fill("prad_wrong")
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("alert")).to_contain_text("No operator has this token")
        page.get_by_label("Token").fill(admin)
        page.get_by_role("button", name="Sign in").click()
        assert page.evaluate("document.cookie") == ""
        page.get_by_role("link", name="Keys").click()
        page.get_by_label("Name").fill("alice")
        page.get_by_label("Tasks").fill("support")
        page.get_by_role("button", name="Make a key").click()
        expect(page.locator(".token")).to_contain_text("prad_")
        page.reload()
        expect(page.get_by_role("rowheader", name="alice")).to_be_visible()
        expect(page.locator(".token")).to_have_count(0)
        page.get_by_role("row", name="alice").get_by_role("button", name="Revoke …").click()
        page.get_by_role("dialog").get_by_role("button", name="Revoke alice").click()
        expect(page.get_by_text("alice is revoked")).to_be_visible()
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
