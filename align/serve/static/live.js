// Live pages: events of the server become htmx triggers and new points of the charts.
(() => {
  "use strict";
  const place = document.querySelector("[data-series]");
  let asked = Promise.resolve();

  // New values of the charts. A panel that has no place yet (a metric that was constant so far, or
  // a new stage) needs the training sections again, in which it has one.
  async function refresh() {
    const answer = await fetch(place.dataset.series, { headers: { accept: "application/json" } });
    if (!answer.ok) return;
    const found = await answer.json();
    const placed = (chart) => document.querySelector(`figure[data-chart="${CSS.escape(chart.id)}"]`);
    if (place.dataset.training && !found.charts.every(placed)) {
      await htmx.ajax("GET", place.dataset.training, { target: "#training-part", swap: "innerHTML" });
    }
    window.alignCharts.update(found);
  }

  // One after the other: an answer that is late must not replace a newer one.
  function draw() {
    asked = asked.then(refresh).catch(() => undefined);
  }

  if (place && window.alignCharts) draw();
  // Only a visible page listens: a browser opens at most six connections to a server, and tabs in
  // the background would use them up. One that is seen again gets what it missed.
  let source = null;
  function listen() {
    if (source) source.close();
    source = document.hidden ? null : new EventSource(place.dataset.events);
    if (source) source.addEventListener("changed", (event) => {
      for (const part of JSON.parse(event.data)) {
        if (part === "series") draw();
        else htmx.trigger(document.body, `live-${part}`);
      }
    });
  }
  if (place && place.dataset.events) {
    listen();
    document.addEventListener("visibilitychange", listen);
    window.addEventListener("pagehide", () => { if (source) source.close(); });
  }

  // Swapped training sections have static pictures: the charts are drawn in them again.
  document.body.addEventListener("htmx:afterSwap", (event) => {
    if (event.detail.target.id === "training-part" && place) draw();
  });

  // A log that is read at its end stays at its end.
  const log = () => document.querySelector("#log-lines .log");
  let atEnd = true;
  const toEnd = () => { if (log()) log().scrollTop = log().scrollHeight; };
  document.body.addEventListener("htmx:beforeSwap", (event) => {
    const shown = log();
    if (event.detail.target.id === "log-lines" && shown) atEnd = shown.scrollTop + shown.clientHeight >= shown.scrollHeight - 8;
  });
  document.body.addEventListener("htmx:afterSwap", (event) => {
    if (event.detail.target.id === "log-lines" && atEnd) toEnd();
  });
  toEnd();

  // What is selected in the table of runs stays selected when its rows are new.
  let selected = [];
  const boxes = (target) => [...target.querySelectorAll('input[name="run"]')];
  document.body.addEventListener("htmx:beforeSwap", (event) => {
    selected = boxes(event.detail.target).filter((box) => box.checked).map((box) => box.value);
  });
  document.body.addEventListener("htmx:afterSwap", (event) => {
    for (const box of boxes(event.detail.target)) box.checked = selected.includes(box.value);
  });
})();
