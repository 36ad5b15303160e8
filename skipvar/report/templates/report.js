"use strict";
const strategy = document.getElementById("strategy");
const text = document.getElementById("text");
const items = Array.from(document.querySelectorAll("[data-strategy]"));
function filter() {
  const wanted = text.value.trim().toLowerCase();
  let shown = 0;
  for (const item of items) {
    const fits = (!strategy.value || item.dataset.strategy === strategy.value)
      && item.dataset.prompt.includes(wanted);
    item.hidden = !fits;
    shown += fits;
  }
  document.getElementById("shown").textContent =
    shown ? shown + " of " + items.length + " shown" : "Nothing matches: try another word or strategy.";
}
strategy.addEventListener("change", filter);
text.addEventListener("input", filter);
document.getElementById("filter").addEventListener("submit", (event) => event.preventDefault());
document.getElementById("filter").addEventListener("reset", () => setTimeout(filter));
filter();
