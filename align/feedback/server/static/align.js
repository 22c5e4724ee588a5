// The page's keys, times and dragging. Everything works without it too: the forms post by themselves.
"use strict";

(function () {
  const root = document.documentElement;
  root.classList.add("js");
  const one = (selector, within) => (within || document).querySelector(selector);
  const all = (selector, within) => [...(within || document).querySelectorAll(selector)];

  // --- time: from when a screen is seen to when it is answered; a hidden tab does not count ---
  let seenMs = 0, since = null;
  const resume = () => { if (since === null && !document.hidden) since = performance.now(); };
  const pause = () => { if (since !== null) { seenMs += performance.now() - since; since = null; } };
  document.addEventListener("visibilitychange", () => (document.hidden ? pause() : resume()));

  let active = 0;
  const groups = () => all(".dimension, .ranked");
  function activate(index) {
    const list = groups();
    if (!list.length) return;
    active = Math.max(0, Math.min(index, list.length - 1));
    list.forEach((group, i) => group.classList.toggle("active", i === active));
    list[active].scrollIntoView({ block: "nearest" });
  }

  let ticket = null;
  function begin() {
    const field = one('#answer input[name="ticket"]'), now = field && field.value;
    // The same screen again, with a notice: its time goes on.
    if (!now || now !== ticket) { seenMs = 0; since = null; ticket = now; }
    resume();
    const waiting = groups().findIndex((group) => !one("input:checked", group));
    activate(Math.max(0, waiting));
    mirror();
    const top = one("#top");
    if (top) top.focus({ preventScroll: true });
  }

  // --- choosing ---
  function check(input, on) {
    if (!input || input.disabled) return;
    input.checked = on === undefined ? true : on;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  }
  const option = (name, value) => one(`#answer input[name="${name}"][value="${value}"]`);
  const groupName = (group) => one("input", group).name;

  function step(group, by) {
    const inputs = all("input[type=radio]", group);
    if (!inputs.length) return;
    const now = inputs.findIndex((input) => input.checked);
    const start = by > 0 ? -1 : inputs.length;
    const middle = group.matches(".dimension") ? Math.floor(inputs.length / 2) : start + by;
    check(inputs[now < 0 ? middle : Math.max(0, Math.min(inputs.length - 1, now + by))]);
  }

  document.addEventListener("change", (event) => {
    const group = event.target.closest(".dimension, .ranked");
    if (group) activate(groups().indexOf(group));
    const list = event.target.closest(".rank-list");
    if (list && list.dataset.tie === "false" && event.target.checked) {
      all(`input[value="${event.target.value}"]`, list).forEach((other) => { if (other !== event.target) other.checked = false; });
    }
    if (event.target.closest("#answer")) say("");
    mirror();
  });

  document.addEventListener("click", (event) => {
    const opener = event.target.closest("[data-open]");
    const dialog = opener && one("#" + opener.dataset.open);
    if (dialog) { event.preventDefault(); dialog.showModal(); return; }
    if (event.target.matches("dialog")) event.target.close();
    const card = event.target.closest("[data-choice]");
    if (card && !event.target.closest("a, video, input, label") && !String(getSelection())) check(option("choice", card.dataset.choice));
    const ranked = event.target.closest(".ranked");
    if (ranked) activate(groups().indexOf(ranked));
  });

  // --- what the inputs say, shown elsewhere: the chosen card, the chips of a ranking ---
  function mirror() {
    all("[data-choice]").forEach((card) => card.classList.toggle("chosen", Boolean((option("choice", card.dataset.choice) || {}).checked)));
    if (!one(".tiers")) return;
    all(".tiers .chips").forEach((chips) => chips.replaceChildren());
    all(".ranked").forEach((card) => {
      const chosen = one("input:checked", card);
      const chip = document.createElement("span");
      chip.className = "chip";
      chip.dataset.place = card.dataset.place;
      chip.textContent = one(".letter", card).textContent;
      one(`.tier[data-rank="${chosen ? chosen.value : ""}"] .chips`).append(chip);
      card.classList.toggle("chosen", Boolean(chosen));
    });
  }

  // --- dragging an output to a rank ---
  let drag = null;
  const tierAt = (event) => { const under = document.elementFromPoint(event.clientX, event.clientY); return under && under.closest(".tier"); };
  document.addEventListener("pointerdown", (event) => {
    const grip = event.target.closest(".grip, .chip");
    if (!grip || event.button !== 0) return;
    event.preventDefault();
    const place = grip.dataset.place || grip.closest(".ranked").dataset.place;
    const ghost = document.createElement("span");
    ghost.className = "chip ghost";
    ghost.textContent = grip.textContent;
    document.body.append(ghost);
    drag = { place, ghost };
    move(event);
  });
  function move(event) {
    if (!drag) return;
    drag.ghost.style.left = event.clientX + "px";
    drag.ghost.style.top = event.clientY + "px";
    const tier = tierAt(event);
    all(".tier").forEach((other) => other.classList.toggle("over", other === tier));
  }
  function drop(event) {
    if (!drag) return;
    const tier = event.type === "pointerup" ? tierAt(event) : null;
    const { place, ghost } = drag;
    drag = null;
    ghost.remove();
    all(".tier").forEach((other) => other.classList.remove("over"));
    if (!tier) return;
    if (tier.dataset.rank) check(option("r" + place, tier.dataset.rank));
    else { all(`input[name="r${place}"]`).forEach((input) => { input.checked = false; }); mirror(); }
  }
  document.addEventListener("pointermove", move);
  document.addEventListener("pointerup", drop);
  document.addEventListener("pointercancel", drop);

  // --- keys ---
  const submit = (selector) => { const form = one(selector); if (form) form.requestSubmit(); };
  const digit = (key) => (/^[0-9]$/.test(key) ? Number(key) : null);

  function rate(event) {
    const list = groups(), group = list[active];
    if (!group) return false;
    const low = Number(group.dataset.low), high = Number(group.dataset.high), number = digit(event.key);
    if (number !== null) {
      const value = number === 0 && low > 0 && high === 10 ? 10 : number;
      const input = option(groupName(group), value);
      if (!input) return false;
      check(input);
      activate(active + 1);
    } else if (event.key === "ArrowLeft") step(group, -1);
    else if (event.key === "ArrowRight") step(group, 1);
    else if (event.key === "ArrowUp") activate(active - 1);
    else if (event.key === "ArrowDown") activate(active + 1);
    else return false;
    return true;
  }
  function compare(event) {
    const value = { a: "a", b: "b", t: "tie", x: "both_bad", ArrowLeft: "a", ArrowRight: "b" }[event.key];
    const input = value && option("choice", value);
    if (input) check(input);
    return Boolean(input);
  }
  function rank(event) {
    const list = groups(), group = list[active], number = digit(event.key);
    const letter = /^[a-i]$/.test(event.key) && event.key !== "i" ? event.key.charCodeAt(0) - 97 : -1;
    if (number) {
      const input = option(groupName(group), number);
      if (!input) return false;
      check(input);
      const next = list.findIndex((other) => !one("input:checked", other));
      activate(next < 0 ? active : next);
    } else if (event.key === "ArrowUp") activate(active - 1);
    else if (event.key === "ArrowDown") activate(active + 1);
    else if (event.key === "ArrowLeft") step(group, -1);
    else if (event.key === "ArrowRight") step(group, 1);
    else if (letter >= 0 && letter < list.length) activate(letter);
    else return false;
    return true;
  }
  function thumb(event) {
    const number = digit(event.key);
    if (event.key === "ArrowUp" || event.key === "+") check(option("thumb", "up"));
    else if (event.key === "ArrowDown" || event.key === "-") check(option("thumb", "down"));
    else if (number) {
      const box = all('input[name="reaction"]')[number - 1];
      if (!box) return false;
      check(box, !box.checked);
    } else return false;
    return true;
  }
  const byKind = { rating: rate, pairwise: compare, ranking: rank, thumbs: thumb };

  function common(event) {
    const key = event.key;
    if (key === "u") submit('form[action="/undo"]');
    else if (key === "s") submit('form[action="/skip"]');
    else if (key === "?") one("#help").showModal();
    else if (key === "i") one("#guide").showModal();
    else if (key === "r") { const field = one("#reason, #correction"); if (!field) return false; field.focus(); }
    else if (key === "p") all("video").forEach((video) => (video.paused ? video.play() : video.pause()));
    else if (key === "Enter") {
      if (event.target.closest("button, a, summary")) return false;
      submit("#answer");
    } else return false;
    return true;
  }

  document.addEventListener("keydown", (event) => {
    const dialog = one("dialog[open]");
    if (dialog) { if (event.key === "?" || event.key === "i") { dialog.close(); event.preventDefault(); } return; }
    const screen = one("#screen");
    if (!screen) return;
    if (event.target.matches("textarea, input[type=text], input[type=number]")) {
      if (event.key === "Escape") event.target.blur();
      else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); submit("#answer"); }
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.repeat && !event.key.startsWith("Arrow")) return;
    const handle = one("#answer") && byKind[screen.dataset.kind];
    if ((handle && handle(event)) || common(event)) event.preventDefault();
  });

  // --- sending ---
  const say = (text) => { const notice = one("#notice"); if (notice) notice.textContent = text; };
  document.addEventListener("submit", (event) => {
    if (event.target.id !== "answer") return;
    const extra = since === null ? 0 : performance.now() - since;
    one('input[name="latency_ms"]', event.target).value = Math.round(seenMs + extra);
  }, true);
  document.addEventListener("htmx:afterSwap", begin);
  document.addEventListener("htmx:sendError", () => say("Not saved: the server cannot be reached. Press Next to try again."));
  document.addEventListener("htmx:timeout", () => say("Not saved: the server does not answer. Press Next to try again."));
  document.addEventListener("htmx:responseError", (event) => say("Not saved: " + (event.detail.xhr.responseText || "the server refused") + " Press Next to try again."));

  // A link may bring a token behind the #, which no server and no log ever sees.
  const door = one("form[action='/enter'] input[type=password]");
  if (door && location.hash.length > 16) {
    door.value = decodeURIComponent(location.hash.slice(1));
    history.replaceState(null, "", location.pathname);
    door.form.submit();
  }
  if (one("#screen")) begin();
  const start = one("#start");
  if (start) start.focus();
})();
