// Interactive charts of the report and of the live pages. The payload is described in series.py.
// No library, no request, no eval; text only ever enters the page as text.
(() => {
  "use strict";
  const NS = "http://www.w3.org/2000/svg";
  const LEFT = 58, RIGHT = 12, TOP = 10, BOTTOM = 36, COLOURS = 8, DRAG_PX = 5, LONG_TICK = 6;
  const AXES = { step: "step", time_s: "time", tokens: "tokens" };
  const view = { axis: "step", smooth: 0, log: false };
  const charts = new Map();
  let payload = { axes: [], charts: [] };

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function shape(name, attributes = {}, text = null) {
    const made = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== null) made.textContent = text;
    return made;
  }

  // Scales and numbers

  function ticks(low, high, count) {
    if (!(high - low > 1e-12 * Math.max(Math.abs(low), Math.abs(high)))) {
      const pad = Math.abs(low) * 0.1 || 1;
      [low, high] = [low - pad, high + pad];
    }
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
    const found = [];
    const last = Math.ceil(high / step - 1e-9);
    for (let i = Math.floor(low / step + 1e-9); i <= last; i++) found.push(i * step);
    return found;
  }

  function logTicks(low, high) {
    const found = [];
    const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
    const stride = Math.max(1, Math.ceil((last - first) / 6));
    for (let k = first; k <= Math.max(last, first + 1); k += stride) found.push(10 ** k);
    if (found[found.length - 1] < high) found.push(found[found.length - 1] * 10 ** stride);
    return found;
  }

  function tickLabel(value, all) {
    const step = all.length > 1 ? all[1] - all[0] : Math.abs(value) || 1;
    const biggest = Math.max(...all.map(Math.abs));
    if (Math.abs(value) < step * 1e-6) return "0";
    if (biggest < 1e-3 || biggest >= 1e7) return value.toExponential(1);
    if (step >= 1000) return `${+(value / 1000).toFixed(1)}k`;
    return value.toFixed(Math.max(0, -Math.floor(Math.log10(step) + 1e-9)));
  }

  function number(value) {
    if (value === null || value === undefined) return "-";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(3);
    return String(+value.toPrecision(5));
  }

  function clock(seconds) {
    if (seconds < 120) return `${+seconds.toFixed(1)} s`;
    const minutes = seconds / 60;
    return minutes < 120 ? `${minutes.toFixed(1)} min` : `${(minutes / 60).toFixed(2)} h`;
  }

  // Debiased exponential mean, as TensorBoard smooths; a gap stays a gap.
  function smoothed(values, weight) {
    if (!weight) return values;
    let sum = 0, total = 0;
    return values.map((y) => {
      if (y === null) return null;
      sum = sum * weight + (1 - weight) * y;
      total = total * weight + (1 - weight);
      return sum / total;
    });
  }

  // One chart

  class Chart {
    constructor(figure, data) {
      this.figure = figure;
      this.hidden = new Set();
      this.range = null;
      this.cursor = null;
      this.wide = false;
      this.svg = shape("svg", { role: "img", tabindex: "0", class: "live" });
      this.tip = element("div", { class: "tip", hidden: "" });
      this.tools = element("div", { class: "chart-tools" });
      const old = figure.querySelector(":scope > svg");
      if (old) old.remove();
      this.caption = figure.querySelector("figcaption");
      figure.append(this.svg, this.tip, this.tools);
      this.listen();
      this.set(data);
      this.width = 0;
      // In the next frame: drawing changes the size, which the observer would report as a loop.
      new ResizeObserver(() => requestAnimationFrame(() => {
        if (this.figure.clientWidth !== this.width) this.draw();
      })).observe(figure);
    }

    set(data) {
      this.data = data;
      this.svg.setAttribute("aria-label", `${data.group} ${data.title}`);
      this.legend();
      this.draw();
    }

    lines() {
      return this.data.lines.map((line, i) => {
        const axis = payload.axes[line.axis] || { step: [] };
        const x = axis[view.axis] || axis.step, log = this.isLog();
        const drawable = (v) => (v === null || v === undefined || (log && v <= 0) ? null : v);
        const raw = line.y.map(drawable);
        return {
          x, raw, axis, label: line.label, place: (i % COLOURS) + 1, hidden: this.hidden.has(line.label),
          y: smoothed(raw, view.smooth),
          low: (line.low || []).map(drawable), high: (line.high || []).map(drawable),
        };
      });
    }

    isLog() {
      return view.log && this.data.lines.some((line) => line.y.some((y) => y > 0));
    }

    legend() {
      const shown = new Map([...this.caption.querySelectorAll("button.line")].map((b) => [b.dataset.label, b]));
      if (!shown.size) for (const old of this.caption.querySelectorAll("span")) old.remove();
      for (const [i, line] of this.data.lines.entries()) {
        const last = line.y.findLast((y) => y !== null);
        let button = shown.get(line.label);
        if (!button) {
          button = element("button", { type: "button", class: "line", "data-label": line.label, "aria-pressed": "true" });
          button.addEventListener("click", () => this.toggle(line.label, button));
          this.caption.append(button);
        }
        shown.delete(line.label);
        const name = this.data.lines.length > 1 ? line.label : "last";
        button.replaceChildren(element("i", { class: `key line${(i % COLOURS) + 1}` }), `${name} ${number(last)}`);
      }
      for (const gone of shown.values()) gone.remove();
    }

    toggle(label, button) {
      if (this.hidden.has(label)) this.hidden.delete(label);
      else this.hidden.add(label);
      button.setAttribute("aria-pressed", String(!this.hidden.has(label)));
      this.draw();
    }

    draw() {
      this.width = this.figure.clientWidth;
      // In a closed <details>: drawn when it opens.
      if (!this.width || !this.data) return;
      const W = Math.max(220, this.width - 20), H = this.wide ? 380 : 200;
      const lines = this.lines().filter((line) => !line.hidden);
      const frame = this.scale(lines, W, H);
      this.frame = frame;
      this.svg.setAttribute("viewBox", `0 0 ${W} ${H}`);
      this.svg.replaceChildren();
      this.buttons();
      if (!frame) {
        this.svg.append(shape("text", { x: W / 2, y: H / 2, class: "middle" }, "no finite value here"));
        return;
      }
      this.svg.append(this.axes(frame), this.band(frame));
      for (const line of lines) {
        this.svg.append(this.area(line, frame));
        if (view.smooth) this.svg.append(this.path(line, line.raw, frame, "raw"));
        this.svg.append(this.path(line, line.y, frame, ""));
      }
      this.mark = shape("line", { class: "cursor", y1: TOP, y2: H - BOTTOM, visibility: "hidden" });
      this.picked = shape("rect", { class: "picked", y: TOP, height: H - TOP - BOTTOM, visibility: "hidden" });
      this.svg.append(this.picked, this.mark);
      if (this.cursor !== null) this.hover(this.cursor);
    }

    scale(lines, W, H) {
      const inside = (x) => !this.range || (x >= this.range[0] && x <= this.range[1]);
      let xs = [Infinity, -Infinity], ys = [Infinity, -Infinity];
      const grow = (span, v) => { span[0] = Math.min(span[0], v); span[1] = Math.max(span[1], v); };
      for (const line of lines) {
        line.x.forEach((x, i) => {
          if (!inside(x) || line.y[i] === null) return;
          grow(xs, x);
          for (const v of [line.y[i], line.low[i], line.high[i], view.smooth ? null : line.raw[i]]) {
            if (v !== null && v !== undefined) grow(ys, v);
          }
        });
      }
      if (xs[0] > xs[1]) return null;
      if (this.range) xs = this.range;
      if (xs[0] === xs[1]) xs = [xs[0], xs[0] + 1];
      const log = this.isLog();
      const yTicks = log ? logTicks(ys[0], ys[1]) : ticks(ys[0], ys[1], this.wide ? 7 : 4);
      const of = log ? Math.log10 : (v) => v;
      const y0 = of(yTicks[0]), y1 = of(yTicks[yTicks.length - 1]);
      return {
        W, H, xs, yTicks, log,
        x: (v) => LEFT + ((v - xs[0]) / (xs[1] - xs[0])) * (W - LEFT - RIGHT),
        y: (v) => TOP + ((y1 - of(v)) / (y1 - y0)) * (H - TOP - BOTTOM),
        back: (px) => xs[0] + ((px - LEFT) / (W - LEFT - RIGHT)) * (xs[1] - xs[0]),
      };
    }

    axes(frame) {
      const { W, H, xs, yTicks } = frame, group = shape("g", { class: "axes" });
      for (const v of yTicks) {
        const y = frame.y(v).toFixed(1);
        group.append(shape("line", { x1: LEFT, x2: W - RIGHT, y1: y, y2: y }));
        const text = frame.log ? (v >= 0.01 && v < 1e5 ? String(+v.toPrecision(1)) : v.toExponential(0)) : tickLabel(v, yTicks);
        group.append(shape("text", { x: LEFT - 5, y: +y + 4, class: "end" }, text));
      }
      const [unit, size] = this.xUnit(xs);
      const all = ticks(xs[0] / size, xs[1] / size, W > 600 ? 8 : 4);
      for (const v of all) {
        const x = v * size;
        if (x < xs[0] - 1e-9 || x > xs[1] + 1e-9) continue;
        group.append(shape("text", { x: frame.x(x).toFixed(1), y: H - BOTTOM + 15, class: "middle" }, tickLabel(v, all)));
      }
      const note = this.data.note ? `${unit} (${this.data.note})` : unit;
      group.append(shape("text", { x: (LEFT + W - RIGHT) / 2, y: H - 4, class: "middle" }, note));
      const middle = (TOP + H - BOTTOM) / 2;
      // Beside the tick labels; inside the plot where these are so long that they would meet.
      const long = [...group.querySelectorAll("text.end")].some((tick) => tick.textContent.length > LONG_TICK);
      const turn = long
        ? { x: LEFT + 4, y: TOP + 10 }
        : { x: 11, y: middle, transform: `rotate(-90 11 ${middle})`, class: "middle" };
      group.append(shape("text", turn, (this.data.unit || "value") + (frame.log ? ", log" : "")));
      return group;
    }

    xUnit(xs) {
      if (view.axis !== "time_s" || !this.has("time_s")) return [this.has(view.axis) ? AXES[view.axis] : "step", 1];
      if (xs[1] < 120) return ["time (s)", 1];
      return xs[1] < 7200 ? ["time (min)", 60] : ["time (h)", 3600];
    }

    has(axis) {
      return this.data.lines.some((line) => (payload.axes[line.axis] || {})[axis]);
    }

    band(frame) {
      const group = shape("g");
      if (!this.data.band) return group;
      const [bottom, top] = [frame.yTicks[0], frame.yTicks[frame.yTicks.length - 1]];
      const clamp = (v, other) => Math.min(Math.max(v === null ? other : v, bottom), top);
      const [low, high] = [clamp(this.data.band[0], bottom), clamp(this.data.band[1], top)];
      group.append(shape("rect", {
        x: LEFT, width: frame.W - LEFT - RIGHT, y: frame.y(high), class: "band",
        height: Math.max(0, frame.y(low) - frame.y(high)),
      }));
      return group;
    }

    // Points of a line that are in view, split at gaps.
    segments(line, keep) {
      const parts = [[]];
      line.x.forEach((x, i) => {
        if (!keep(i)) parts.push([]);
        else if (!this.range || (x >= this.range[0] && x <= this.range[1])) parts[parts.length - 1].push(i);
      });
      return parts.filter((part) => part.length);
    }

    path(line, values, frame, kind) {
      const group = shape("g", { class: kind });
      for (const part of this.segments(line, (i) => values[i] !== null)) {
        const places = part.map((i) => [frame.x(line.x[i]).toFixed(1), frame.y(values[i]).toFixed(1)]);
        if (places.length > 1) group.append(shape("polyline", { points: places.join(" "), class: `line${line.place}` }));
        // A line of one point is invisible; few points are marked, so that hovering finds them.
        if (places.length === 1 || (part.length <= 12 && !kind)) {
          for (const [cx, cy] of places) group.append(shape("circle", { cx, cy, r: 2.5, class: `line${line.place}` }));
        }
      }
      return group;
    }

    area(line, frame) {
      const group = shape("g");
      const has = (v) => v !== null && v !== undefined;
      for (const part of this.segments(line, (i) => has(line.low[i]) && has(line.high[i]))) {
        const at = (i, v) => `${frame.x(line.x[i]).toFixed(1)},${frame.y(v).toFixed(1)}`;
        if (part.length === 1) {
          const [i] = part, x = frame.x(line.x[i]).toFixed(1);
          group.append(shape("line", { x1: x, x2: x, y1: frame.y(line.low[i]), y2: frame.y(line.high[i]), class: `line${line.place} faint` }));
          continue;
        }
        const outline = [...part.map((i) => at(i, line.high[i])), ...part.toReversed().map((i) => at(i, line.low[i]))];
        group.append(shape("polygon", { points: outline.join(" "), class: `area line${line.place}` }));
      }
      return group;
    }

    // Pointer and keyboard

    listen() {
      const at = (event) => {
        const box = this.svg.getBoundingClientRect();
        const px = ((event.clientX - box.left) / box.width) * (this.frame ? this.frame.W : 1);
        return this.frame ? this.frame.back(Math.min(Math.max(px, LEFT), this.frame.W - RIGHT)) : 0;
      };
      this.svg.addEventListener("pointermove", (event) => {
        this.hover(at(event));
        if (this.from !== undefined) this.select(this.from, at(event));
      });
      this.svg.addEventListener("pointerdown", (event) => {
        if (event.pointerType === "touch" || event.button !== 0) return;
        this.from = at(event);
        this.svg.setPointerCapture(event.pointerId);
      });
      this.svg.addEventListener("pointerup", (event) => {
        if (this.from === undefined) return;
        const [a, b] = [this.from, at(event)].sort((p, q) => p - q);
        this.from = undefined;
        const far = this.frame && this.frame.x(b) - this.frame.x(a) > DRAG_PX;
        if (far) this.zoom([a, b]);
        else this.draw();
      });
      this.svg.addEventListener("pointerleave", () => this.leave());
      this.svg.addEventListener("blur", () => this.leave());
      this.svg.addEventListener("dblclick", () => this.zoom(null));
      this.svg.addEventListener("keydown", (event) => this.key(event));
    }

    key(event) {
      if (!this.frame) return;
      const [a, b] = this.frame.xs, middle = this.cursor === null ? (a + b) / 2 : this.cursor;
      const xs = [...new Set(this.lines().flatMap((line) => line.x))].filter((x) => x >= a && x <= b).sort((p, q) => p - q);
      const after = xs.find((x) => x > middle), before = xs.findLast((x) => x < middle);
      const moves = {
        ArrowRight: () => this.hover(this.cursor === null ? xs[0] : (after ?? middle)),
        ArrowLeft: () => this.hover(this.cursor === null ? xs[xs.length - 1] : (before ?? middle)),
        "+": () => this.zoom([middle - (middle - a) / 2, middle + (b - middle) / 2]),
        "-": () => this.zoom([middle - (middle - a) * 2, middle + (b - middle) * 2]),
        0: () => this.zoom(null),
        Escape: () => { this.leave(); this.zoom(null); },
      };
      if (!moves[event.key] || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      moves[event.key]();
    }

    zoom(range) {
      this.range = range;
      this.draw();
    }

    select(a, b) {
      const [x0, x1] = [this.frame.x(Math.min(a, b)), this.frame.x(Math.max(a, b))];
      this.picked.setAttribute("x", x0);
      this.picked.setAttribute("width", x1 - x0);
      this.picked.setAttribute("visibility", "visible");
    }

    leave() {
      this.cursor = null;
      this.tip.hidden = true;
      if (this.mark) this.mark.setAttribute("visibility", "hidden");
    }

    // The values at the logged x nearest to a place.
    hover(x) {
      if (!this.frame || !this.mark) return;
      let best = null;
      const lines = this.lines().filter((line) => !line.hidden);
      for (const line of lines) {
        line.x.forEach((v, i) => {
          if (line.raw[i] === null || v < this.frame.xs[0] || v > this.frame.xs[1]) return;
          if (best === null || Math.abs(v - x) < Math.abs(best - x)) best = v;
        });
      }
      if (best === null) return;
      this.cursor = best;
      const px = this.frame.x(best);
      this.mark.setAttribute("x1", px);
      this.mark.setAttribute("x2", px);
      this.mark.setAttribute("visibility", "visible");
      const said = view.axis === "time_s" && this.has("time_s") ? clock(best) : number(best);
      const rows = [element("b", {}, `${this.xUnit([0, 0])[0].replace(" (s)", "")} ${said}`)];
      for (const line of lines) {
        const i = line.x.lastIndexOf(best);
        if (i < 0 || line.raw[i] === null) continue;
        const interval = line.low[i] === null || line.low[i] === undefined ? "" : ` [${number(line.low[i])}, ${number(line.high[i])}]`;
        const mean = view.smooth ? `, smoothed ${number(line.y[i])}` : "";
        rows.push(element("div", {}, element("i", { class: `key line${line.place}` }), `${line.label} ${number(line.raw[i])}${interval}${mean} ${this.data.unit}`));
      }
      this.tip.replaceChildren(...rows);
      this.tip.hidden = false;
      const box = this.svg.getBoundingClientRect(), outer = this.figure.getBoundingClientRect();
      const left = box.left - outer.left + (px / this.frame.W) * box.width;
      const room = this.figure.clientWidth - this.tip.offsetWidth - 4;
      const place = left + 12 > room ? left - this.tip.offsetWidth - 12 : left + 12;
      this.tip.style.left = `${Math.max(4, Math.min(place, room))}px`;
      this.tip.style.top = `${box.top - outer.top + TOP}px`;
    }

    // Buttons and downloads

    buttons() {
      if (!this.tools.childElementCount) {
        const add = (text, title, action) => {
          const button = element("button", { type: "button", title }, text);
          button.addEventListener("click", action);
          this.tools.append(button);
          return button;
        };
        this.reset = add("Reset zoom", "Show all steps (double click, or 0)", () => this.zoom(null));
        this.larger = add("Larger", "Larger or smaller chart", () => this.resize());
        add("PNG", "Download the picture", () => this.png());
        add("CSV", "Download the values", () => this.csv());
      }
      this.reset.hidden = !this.range;
    }

    resize() {
      this.wide = !this.wide;
      this.larger.textContent = this.wide ? "Smaller" : "Larger";
      this.figure.classList.toggle("wide-chart", this.wide);
      this.draw();
    }

    csv() {
      const quoted = (v) => (v === null || v === undefined ? "" : /[",\n]/.test(v) ? `"${String(v).replaceAll('"', '""')}"` : v);
      const rows = [["line", "step", "time_s", "tokens", "value", "low", "high"]];
      for (const line of this.data.lines) {
        const axis = payload.axes[line.axis];
        line.y.forEach((y, i) => rows.push([
          line.label, axis.step[i], (axis.time_s || [])[i], (axis.tokens || [])[i], y, (line.low || [])[i], (line.high || [])[i],
        ]));
      }
      this.save(new Blob([rows.map((row) => row.map(quoted).join(",")).join("\n") + "\n"], { type: "text/csv" }), "csv");
    }

    png() {
      // The picture outside of the page has no style sheet: its looks become attributes.
      const copy = this.svg.cloneNode(true), { W, H } = this.frame || { W: 340, H: 200 };
      const looks = ["fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "font-size", "font-family", "text-anchor", "visibility"];
      const originals = this.svg.querySelectorAll("*");
      copy.querySelectorAll("*").forEach((node, i) => {
        const style = getComputedStyle(originals[i]);
        for (const look of looks) node.setAttribute(look, style.getPropertyValue(look));
      });
      copy.setAttribute("viewBox", `0 -26 ${W} ${H + 26}`);
      copy.setAttribute("width", 2 * W);
      copy.setAttribute("height", 2 * (H + 26));
      const page = getComputedStyle(document.body);
      const names = this.data.lines.length > 1 ? ` (${this.data.lines.map((line) => line.label).join(", ")})` : "";
      const title = shape("text", { x: 8, y: -9, fill: page.color, "font-size": "13px", "font-family": "sans-serif" }, `${this.data.group}: ${this.data.title}${names}`);
      copy.prepend(shape("rect", { x: 0, y: -26, width: W, height: H + 26, fill: page.backgroundColor }), title);
      const image = new Image();
      image.addEventListener("load", () => {
        const canvas = element("canvas", { width: 2 * W, height: 2 * (H + 26) });
        canvas.getContext("2d").drawImage(image, 0, 0);
        canvas.toBlob((blob) => this.save(blob, "png"));
      });
      image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(copy))}`;
    }

    save(blob, ending) {
      const link = element("a", { download: `${this.data.id.replace(/[^\w.-]+/g, "-")}.${ending}`, href: URL.createObjectURL(blob) });
      document.body.append(link);
      link.click();
      link.remove();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    }
  }

  // The page

  function redraw() {
    for (const chart of charts.values()) chart.draw();
  }

  function controls(holder) {
    const axis = element("select", {});
    const present = Object.keys(AXES).filter((name) => name === "step" || payload.axes.some((a) => a[name]));
    for (const name of present) axis.append(element("option", { value: name }, AXES[name]));
    axis.value = view.axis;
    axis.addEventListener("change", () => {
      view.axis = axis.value;
      for (const chart of charts.values()) { chart.range = null; chart.cursor = null; chart.tip.hidden = true; }
      redraw();
    });
    const smooth = element("input", { type: "range", min: "0", max: "0.98", step: "0.02", value: String(view.smooth) });
    smooth.addEventListener("input", () => { view.smooth = +smooth.value; redraw(); });
    const log = element("input", { type: "checkbox" });
    log.checked = view.log;
    log.addEventListener("change", () => { view.log = log.checked; redraw(); });
    holder.replaceChildren(
      element("label", {}, "x axis ", axis), element("label", {}, "smoothing ", smooth),
      element("label", {}, log, " log scale"),
      element("span", { class: "quiet" }, "Drag over a chart to zoom, double click to reset; with the keyboard: arrows, + and -."),
    );
    holder.hidden = false;
  }

  // One chart with a metric of several stages, chosen by the reader.
  function overlay(figure) {
    const titles = new Map();
    for (const chart of payload.charts) titles.set(chart.title, (titles.get(chart.title) || new Set()).add(chart.group));
    const shared = [...titles].filter(([, groups]) => groups.size > 1).map(([title]) => title);
    figure.hidden = !shared.length;
    if (!shared.length) return;
    let choice = figure.querySelector("select");
    if (!choice) {
      choice = element("select", { "aria-label": "metric" });
      figure.querySelector("figcaption").append(choice);
      choice.addEventListener("change", () => overlay(figure));
    }
    const before = choice.value;
    choice.replaceChildren(...shared.map((title) => element("option", {}, title)));
    choice.value = shared.includes(before) ? before : shared[0];
    const parts = payload.charts.filter((chart) => chart.title === choice.value);
    const lines = parts.flatMap((part) => part.lines.map((line) => ({
      ...line, label: part.lines.length > 1 ? `${part.group} ${line.label}` : part.group,
    })));
    show(figure, { ...parts[0], id: `overlay/${choice.value}`, group: "stages", band: null, lines }, "overlay");
  }

  function show(figure, data, key = data.id) {
    const known = charts.get(key);
    if (known && known.figure === figure) known.set(data);
    else charts.set(key, new Chart(figure, data));
  }

  // Draws every chart that has a place in the page; called again with newer data, it keeps the zoom.
  function update(found) {
    payload = found;
    for (const data of payload.charts) {
      const figure = document.querySelector(`figure[data-chart="${CSS.escape(data.id)}"]`);
      if (figure) show(figure, data);
    }
    for (const [key, chart] of charts) if (!chart.figure.isConnected) charts.delete(key);
    for (const holder of document.querySelectorAll("[data-chart-controls][hidden]")) controls(holder);
    for (const figure of document.querySelectorAll("figure[data-overlay]")) overlay(figure);
  }

  window.alignCharts = { update };
  const data = document.getElementById("align-series");
  if (data) update(JSON.parse(data.textContent));
})();
