"use strict";
(() => {
  const root = document.documentElement;
  const asked = new URLSearchParams(location.search);
  const system = matchMedia("(prefers-color-scheme: dark)");

  const theme = document.getElementById("theme");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const name = () => { theme.textContent = isDark() ? "light" : "dark"; };
  if (["light", "dark"].includes(asked.get("theme"))) root.dataset.theme = asked.get("theme");
  theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; name(); });
  system.addEventListener("change", name);
  theme.hidden = false;
  name();

  const buttons = [...document.querySelectorAll("[data-choose]")];
  const choose = (score) => {
    document.body.dataset.score = score;
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.choose === score));
  };
  for (const button of buttons) {
    button.parentElement.hidden = false;
    button.addEventListener("click", () => {
      const before = button.getBoundingClientRect().top;
      choose(button.dataset.choose);
      scrollBy({ top: button.getBoundingClientRect().top - before, behavior: "instant" });
    });
  }
  choose(asked.get("score") === "lenient" ? "lenient" : "strict");

  const filter = document.getElementById("filter");
  if (filter) {
    const cards = [...document.querySelectorAll(".flips article")];
    const show = () => {
      const wanted = [...new FormData(filter)].filter(([, value]) => value);
      for (const card of cards) card.hidden = !wanted.every(([key, value]) => card.dataset[key] === value);
      filter.querySelector("output").textContent = `${cards.filter((card) => !card.hidden).length} of ${cards.length}`;
    };
    filter.addEventListener("change", show);
    filter.hidden = false;
    show();
  }
})();
