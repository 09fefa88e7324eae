// The labeling page: one key per answer, the next item loaded in advance, every text as text.
"use strict";
(() => {
  const work = document.getElementById("work");
  const { project, kind, csrf } = work.dataset;
  const by = (id) => document.getElementById(id);
  const KEYS = {
    pairwise: { 1: "left", 2: "right", 0: "tie", b: "bad", e: "edit-left", r: "edit-right" },
    thumbs: { 1: "good", 2: "bad" },
    steps: { 1: "step-good", 2: "step-bad", Enter: "steps", ArrowUp: "up", ArrowDown: "down" },
  }[kind];
  const ALWAYS = { s: "skip", u: "undo", "?": "help" };

  let current = null; // the task on the screen
  let ahead = []; // tasks that come after it
  let exhausted = false; // the server has no further item for this annotator
  let shownAt = 0;
  let edited = null; // side whose response is edited
  let steps = []; // answer to each step
  let step = 0;
  const unsent = new Set(); // numbers of tasks whose answer is not recorded yet
  let sending = Promise.resolve(); // the last request

  async function send(path, body) {
    const headers = { "X-CSRF-Token": csrf, "Content-Type": "application/json" };
    const request = { method: "POST", headers, body: JSON.stringify(body ?? {}) };
    const response = await fetch(`/labels/${project}/${path}`, request);
    const found = await response.json().catch(() => ({}));
    if (!response.ok) {
      const error = new Error(found.error || `The server answered ${response.status}.`);
      error.status = response.status;
      throw error;
    }
    const left = "left" in found ? `, ${counted(found.left, "item")} left` : "";
    by("progress").textContent = `${counted(found.mine, "answer")} by you${left}`;
    return found;
  }

  function counted(count, name) {
    return `${count} ${name}${count === 1 ? "" : "s"}`;
  }

  function say(problem) {
    by("problem").hidden = !problem;
    by("problem").textContent = problem || "";
  }

  // ---- showing

  function element(name, text, className) {
    const made = document.createElement(name);
    made.textContent = text; // never as HTML: models wrote it
    if (className) made.className = className;
    return made;
  }

  function textOf(turn) {
    return typeof turn.content === "string" ? turn.content : JSON.stringify(turn.content ?? "");
  }

  function show(turns, place, label) {
    place.replaceChildren();
    if (label) place.append(element("span", label, "role"));
    for (const turn of turns) {
      const box = element("div", "", "turn");
      if (turns.length > 1) box.append(element("span", turn.role, "role"));
      if (turn.reasoning_content) box.append(element("div", turn.reasoning_content, "quiet"));
      box.append(element("div", textOf(turn)));
      if (turn.tool_calls) box.append(element("pre", JSON.stringify(turn.tool_calls, null, 1)));
      place.append(box);
    }
  }

  function render() {
    closeEditor();
    by("task").hidden = by("skip").hidden = !current;
    by("none").hidden = Boolean(current) || !exhausted;
    if (!current) return;
    show(current.prompt, by("prompt"));
    const labels = { pairwise: ["Left", "Right"], thumbs: [""], steps: [] }[kind];
    by("responses").replaceChildren(
      ...current.responses.map((turns, i) => {
        const box = element("div", "", "response");
        show(turns, box, labels[i] ?? `Step ${i + 1}`);
        return box;
      }),
    );
    steps = current.responses.map(() => null);
    step = 0;
    if (kind === "steps") markSteps();
    for (const button of document.querySelectorAll("[data-reason]")) {
      button.setAttribute("aria-pressed", "false");
    }
    shownAt = performance.now();
  }

  function markSteps() {
    [...by("responses").children].forEach((box, i) => {
      if (i === step) box.setAttribute("aria-current", "step");
      else box.removeAttribute("aria-current");
      if (steps[i] === null) delete box.dataset.said;
      else box.dataset.said = String(steps[i]);
    });
    document.querySelector("[data-act=steps]").disabled = steps.includes(null);
  }

  // ---- tasks

  // Requests go one after the other: an answer before the question for what comes after it.
  function enqueue(request) {
    sending = sending.then(request).catch((error) => say(error.message));
  }

  function load() {
    enqueue(async () => {
      if (ahead.length) return;
      // Not what is on the screen, nor what was answered since and waits to be sent.
      const beside = [current?.id, ...unsent].filter(Boolean);
      const found = await send(`next?beside=${beside.join(",")}`);
      exhausted = !found.task;
      if (found.task) ahead.push(found.task);
      if (!current) advance();
    });
  }

  function advance() {
    current = ahead.shift() ?? null;
    render();
    if (!ahead.length && !(exhausted && !current)) load();
  }

  function finish(body) {
    const task = current;
    if (!task) return;
    say("");
    unsent.add(task.id);
    enqueue(() => deliver(task, body).finally(() => unsent.delete(task.id)));
    exhausted = false;
    advance();
  }

  async function deliver(task, body) {
    for (let wait = 500; ; wait = Math.min(2 * wait, 8000)) {
      try {
        await send(`tasks/${task.id}`, body);
        return;
      } catch (error) {
        say(error.message);
        // Without an answer of the server, the same is sent again: it counts once.
        if (error.status && error.status < 500) return;
        await new Promise((resolve) => setTimeout(resolve, wait));
      }
    }
  }

  function answer(choice, more) {
    const reasons = [...document.querySelectorAll('[data-reason][aria-pressed="true"]')];
    finish({
      choice,
      seconds: (performance.now() - shownAt) / 1000,
      reasons: reasons.map((button) => button.dataset.reason),
      ...more,
    });
  }

  function undo() {
    enqueue(async () => {
      const found = await send("undo");
      if (!found.task) return say("There is nothing to undo.");
      say("");
      if (current) ahead.unshift(current);
      current = found.task;
      render();
    });
  }

  // ---- editing

  function openEditor(side) {
    if (!current) return;
    edited = side;
    const index = side === "left" ? 0 : 1;
    [...by("responses").children].forEach((box, i) => box.classList.toggle("edited", i === index));
    by("edit").value = current.responses[index].map(textOf).join("\n");
    by("editor").hidden = false;
    by("edit").focus();
  }

  function closeEditor() {
    edited = null;
    by("editor").hidden = true;
    for (const box of by("responses").children) box.classList.remove("edited");
  }

  // ---- acts

  const ACTS = {
    left: () => answer("left"),
    right: () => answer("right"),
    tie: () => answer("tie"),
    good: () => answer("good"),
    bad: () => answer("bad"),
    skip: () => finish({ skip: true }),
    undo,
    "edit-left": () => openEditor("left"),
    "edit-right": () => openEditor("right"),
    close: closeEditor,
    "step-good": () => judge(true),
    "step-bad": () => judge(false),
    up: () => move(-1),
    down: () => move(1),
    steps: () => current && !steps.includes(null) && answer("steps", { steps }),
    help: () => {
      const help = by("help");
      help.hidden = !help.hidden;
      document.querySelector("[data-act=help]").setAttribute("aria-expanded", String(!help.hidden));
    },
  };

  function judge(correct) {
    if (!current) return;
    steps[step] = correct;
    move(1);
  }

  function move(by_) {
    step = Math.max(0, Math.min(steps.length - 1, step + by_));
    if (current) markSteps();
  }

  function toggle(button) {
    const pressed = button.getAttribute("aria-pressed") === "true";
    button.setAttribute("aria-pressed", String(!pressed));
  }

  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.metaKey || event.repeat) return;
    if (edited) {
      if (event.key === "Escape") closeEditor();
      else if (event.key === "Enter" && event.ctrlKey) by("editor").requestSubmit();
      return;
    }
    if (event.ctrlKey) return;
    // The digits of the upper row, which are typed with Shift on a French keyboard.
    const digit = /^Digit([0-9])$/.exec(event.code)?.[1];
    if (event.shiftKey && digit) {
      const button = document.querySelectorAll("[data-reason]")[digit - 1];
      if (button) toggle(button);
      event.preventDefault();
      return;
    }
    // A focused button or link has the Enter key for itself.
    if (event.key === "Enter" && event.target.closest("button, a")) return;
    const key = digit ?? event.key;
    const act = KEYS[key] ?? ALWAYS[key];
    if (!act) return;
    event.preventDefault();
    ACTS[act]();
  });

  work.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button?.dataset.act) ACTS[button.dataset.act]();
    else if (button?.dataset.reason) toggle(button);
  });

  by("editor").addEventListener("submit", (event) => {
    event.preventDefault();
    const { value } = by("edit");
    const before = current.responses[edited === "left" ? 0 : 1].map(textOf).join("\n");
    if (!value.trim()) say("The edited response is empty.");
    else answer(edited, value === before ? {} : { edit: value });
  });

  advance();
})();
