// Search, filters and links for the responses to the held-out prompts; text only enters as text.
(() => {
  "use strict";
  const PAGE = 20, MAX_WORDS = 400;
  const source = document.getElementById("align-samples");
  const place = document.querySelector("[data-samples]");
  if (!source || !place) return;
  const { prompts, baseline, rule, total } = JSON.parse(source.textContent);
  if (!prompts.length) return;
  let shown = PAGE;

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  const number = (v) => (v === null || v === undefined ? "-" : String(+v.toPrecision(4)));
  const right = (answer) => (answer.scores || {})[rule];
  const isWrong = (answer) => rule !== null && right(answer) === 0;

  // The judge ranks two responses in the opposite order of the rule.
  function disagrees(answers) {
    return answers.some((a) => answers.some((b) => a.judge > b.judge && right(a) < right(b)));
  }

  // Words of `text` outside of the longest common subsequence with `old`, as marked parts.
  function marked(text, old) {
    const [a, b] = [old, text].map((t) => t.match(/\s+|\S+/g) || []);
    if (a.length > MAX_WORDS || b.length > MAX_WORDS) return [text];
    const best = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
    for (let i = a.length - 1; i >= 0; i--) {
      for (let j = b.length - 1; j >= 0; j--) {
        best[i][j] = a[i] === b[j] ? best[i + 1][j + 1] + 1 : Math.max(best[i + 1][j], best[i][j + 1]);
      }
    }
    const parts = [];
    let i = 0;
    for (let j = 0; j < b.length; j++) {
      while (i < a.length && a[i] !== b[j] && best[i + 1][j] >= best[i][j + 1]) i++;
      const same = i < a.length && a[i] === b[j];
      if (same) i++;
      parts.push(same || !b[j].trim() ? b[j] : element("mark", {}, b[j]));
    }
    return parts;
  }

  function article(prompt) {
    const known = prompt.answers.find((answer) => answer.model === baseline);
    const cells = prompt.answers.map((answer) => {
      const plain = !differences.checked || !known || answer === known;
      const scores = Object.entries(answer.scores || {}).map(([name, v]) => `${name} ${number(v)}`).join(", ");
      return element("div", {}, element("b", {}, answer.model),
        element("span", { class: "score", title: scores }, ` ${number(answer.score)}`),
        element("pre", {}, ...(plain ? [answer.text] : marked(answer.text, known.text))));
    });
    const link = element("a", { href: `#${prompt.id}`, class: "permalink", title: "link to this prompt" }, "#");
    return element("article", { id: prompt.id }, link, element("pre", { class: "prompt" }, prompt.prompt), element("div", {}, ...cells));
  }

  const search = element("input", { type: "search", placeholder: "Search prompts and responses", "aria-label": "search prompts and responses" });
  const models = [...new Set(prompts.flatMap((prompt) => prompt.answers.map((answer) => answer.model)))];
  const model = element("select", { "aria-label": "model that the filters look at" }, element("option", { value: "" }, "any model"), ...models.map((name) => element("option", {}, name)));
  const order = element("select", { "aria-label": "order" }, element("option", { value: "" }, "in order"), element("option", { value: "longest" }, "longest first"), element("option", { value: "lowest" }, "lowest score first"));
  const box = (checked) => { const made = element("input", { type: "checkbox" }); made.checked = checked; return made; };
  const wrong = box(false), judge = box(false), differences = box(Boolean(baseline));
  const status = element("p", { class: "quiet", role: "status" });
  const list = element("div");
  const more = element("button", { type: "button" });

  function selected() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const of = (prompt) => prompt.answers.filter((answer) => !model.value || answer.model === model.value);
    const found = prompts.filter((prompt) => {
      const text = [prompt.prompt, ...of(prompt).map((answer) => answer.text)].join("\n").toLowerCase();
      return words.every((word) => text.includes(word)) && (!wrong.checked || of(prompt).some(isWrong)) && (!judge.checked || disagrees(prompt.answers));
    });
    const size = (prompt) => Math.max(...of(prompt).map((answer) => answer.length ?? answer.text.length));
    const low = (prompt) => Math.min(...of(prompt).map((answer) => answer.score ?? Infinity));
    if (order.value === "longest") found.sort((a, b) => size(b) - size(a));
    if (order.value === "lowest") found.sort((a, b) => low(a) - low(b));
    return found;
  }

  function draw() {
    const found = selected(), part = found.slice(0, shown);
    list.replaceChildren(...part.map(article));
    const held = total > prompts.length ? `; this page has ${prompts.length} of all ${total}` : "";
    status.textContent = `${found.length} of ${prompts.length} prompts${held}`;
    more.hidden = found.length <= shown;
    more.textContent = `${Math.min(PAGE, found.length - shown)} more prompts`;
  }

  // A link to a prompt shows it, whatever is filtered.
  function follow() {
    const i = prompts.findIndex((prompt) => `#${prompt.id}` === location.hash);
    if (i < 0) return;
    if (!document.getElementById(prompts[i].id)) {
      search.value = "";
      for (const filter of [wrong, judge]) filter.checked = false;
      order.value = "";
      shown = Math.max(shown, i + 1);
      draw();
    }
    document.getElementById(prompts[i].id).scrollIntoView();
  }

  for (const input of [search, model, order, wrong, judge, differences]) {
    input.addEventListener("input", () => { shown = PAGE; draw(); });
  }
  more.addEventListener("click", () => { shown += PAGE; draw(); });
  const label = (input, text) => element("label", {}, input, ` ${text}`);
  const filters = [search, model, order];
  if (rule !== null) filters.push(label(wrong, `wrong (${rule} is 0)`));
  if (rule !== null && prompts.some((prompt) => disagrees(prompt.answers))) filters.push(label(judge, `judge disagrees with ${rule}`));
  if (baseline) filters.push(label(differences, `differences from ${baseline}`));
  place.replaceChildren(element("div", { class: "chart-controls" }, ...filters), status, list, more);
  draw();
  follow();
  window.addEventListener("hashchange", follow);
})();
