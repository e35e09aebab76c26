(async () => {
  "use strict";
  const {config, charts} = JSON.parse(document.getElementById("charts").textContent);
  const options = {
    renderer: "svg", actions: false, ast: true, config,
    tooltip: {theme: "custom", disableDefaultStyle: true},
  };
  const views = new Map();
  // What a legend's button brings out is faded in no other chart of the same run.
  for (const button of document.querySelectorAll("[data-series]")) {
    button.addEventListener("click", () => {
      const article = button.closest("article");
      const picked = button.getAttribute("aria-pressed") === "true" ? "" : button.dataset.series;
      for (const other of article.querySelectorAll("[data-series]")) {
        other.setAttribute("aria-pressed", String(other.dataset.series === picked));
      }
      for (const place of article.querySelectorAll(".legend")) {
        const chart = place.parentElement.querySelector(".chart");
        const known = place.querySelector(`[data-series="${CSS.escape(picked)}"]`);
        views.get(chart.id)?.signal("picked", known ? picked : "").run();
      }
    });
  }
  // A finger does not hover: a tap is told as a pointer that has come, and the next one as its leaving.
  let touched;
  document.addEventListener("click", ({target, clientX, clientY}) => {
    if (!matchMedia("(hover: none)").matches) return;
    touched?.dispatchEvent(new PointerEvent("pointerout", {bubbles: true}));
    touched = target.closest(".chart") && target;
    touched?.dispatchEvent(new PointerEvent("pointermove", {bubbles: true, clientX, clientY}));
  });
  for (const [name, spec] of Object.entries(charts)) {
    const place = document.getElementById(name);
    try {
      views.set(name, (await vegaEmbed(place, spec, options)).view);
    } catch (error) {
      place.textContent = `This figure cannot be drawn: ${error.message}`;
      console.error(name, error);
    }
  }
  document.body.dataset.drawn = String(views.size);
})();
