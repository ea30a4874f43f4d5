// What the page does without asking the server: its width, dark and light, names for sliders, copying.
(function () {
  "use strict";
  const root = document.documentElement;
  const wanted = () => window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const remembered = () => { try { return localStorage.getItem("dit-probe-theme"); } catch { return null; } };
  if (remembered()) root.dataset.theme = remembered();

  document.addEventListener("click", (event) => {
    if (event.target.closest("#theme")) {
      const next = (root.dataset.theme || wanted()) === "dark" ? "light" : "dark";
      root.dataset.theme = next;
      // What the system wants anyway is not remembered, so that the page follows it again.
      try {
        if (next === wanted()) localStorage.removeItem("dit-probe-theme");
        else localStorage.setItem("dit-probe-theme", next);
      } catch { /* forgotten with the page */ }
    }
    const button = event.target.closest("#copy");
    if (button) {
      const code = document.getElementById("code");
      const say = (text) => {
        const before = "Copy the Python lines";
        button.textContent = text;
        setTimeout(() => { button.textContent = before; }, 1500);
      };
      const select = () => {
        const range = document.createRange();
        range.selectNodeContents(code);
        getSelection().removeAllRanges();
        getSelection().addRange(range);
        say("Selected: press Ctrl+C");
      };
      // Browsers let pages copy on this machine or by https only.
      if (navigator.clipboard) navigator.clipboard.writeText(code.textContent).then(() => say("Copied"), select);
      else select();
    }
  });

  const NAMES = { layers: ["first layer", "last layer"], steps: ["first step", "last step"], frame: ["frame"] };
  // Dash gives handles of sliders no name, and lists of boxes the roles of a listbox, in which there may be no boxes.
  function repair() {
    for (const [id, names] of Object.entries(NAMES)) {
      const around = document.getElementById(id)?.closest("fieldset");
      around?.querySelectorAll("[role=slider]").forEach((handle, index) => set(handle, "aria-label", names[index]));
      around?.querySelectorAll("input").forEach((box, index) => set(box, "aria-label", names[index]));
    }
    for (const list of document.querySelectorAll("#choose .dash-options-list")) {
      set(list, "role", list.querySelector("[type=radio]") ? "radiogroup" : "group");
      set(list, "aria-label", list.closest("fieldset").querySelector("legend").textContent);
      for (const option of list.querySelectorAll("[role=option]")) option.removeAttribute("role");
      for (const option of list.querySelectorAll("[aria-selected]")) option.removeAttribute("aria-selected");
    }
  }
  function set(element, name, value) {
    if (value && element.getAttribute(name) !== value) element.setAttribute(name, value);
  }

  function width() {
    return document.getElementById("main").clientWidth;
  }

  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    explorer: {
      start: function () {
        let waiting = 0;
        window.addEventListener("resize", () => {
          clearTimeout(waiting);
          waiting = setTimeout(() => window.dash_clientside.set_props("width", { data: width() }), 200);
        });
        if (window.innerWidth < 760) document.getElementById("choose").open = false;
        repair();
        const changes = { childList: true, subtree: true, attributes: true, attributeFilter: ["role", "aria-selected"] };
        new MutationObserver(repair).observe(document.getElementById("choose"), changes);
        return width();
      },
    },
  });
})();
