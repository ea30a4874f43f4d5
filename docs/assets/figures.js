// Where JavaScript runs, the picture of a figure is replaced with the figure itself, once it comes into view.
const load = (() => {
  let loaded;
  return () => (loaded ??= new Promise((done) => {
    const script = document.createElement("script");
    script.src = new URL("plotly.min.js", document.querySelector('script[src$="figures.js"]').src);
    script.onload = done;
    document.head.append(script);
  }));
})();

async function draw(box) {
  await load();
  const { data, layout, frames } = JSON.parse(box.querySelector("script").textContent);
  const figure = document.createElement("div");
  await Plotly.newPlot(figure, { data, layout, frames, config: { displaylogo: false } });
  box.querySelector("img").replaceWith(figure);
}

document.addEventListener("DOMContentLoaded", () => {
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        seen.unobserve(entry.target);
        draw(entry.target);
      }
    }
  });
  document.querySelectorAll(".figure").forEach((box) => seen.observe(box));
});
