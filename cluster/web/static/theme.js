// Light or dark: the system's choice, or the user's, which is remembered.
// Knows the button's id and the attribute that base.css uses. A plain script in the head, not a module: it runs before the first
// paint, so that nothing flashes.
(() => {
  const STORE = "tramontane.theme";
  const system = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;

  function stored() {
    try {
      return localStorage.getItem(STORE);
    } catch {
      return null; // the theme works without storage
    }
  }

  function isDark() {
    return (root.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  }

  function choose(theme) {
    const asSystem = theme === (system.matches ? "dark" : "light");
    if (asSystem) delete root.dataset.theme;
    else root.dataset.theme = theme;
    try {
      if (asSystem) localStorage.removeItem(STORE);
      else localStorage.setItem(STORE, theme);
    } catch {
      // the choice applies until the page is closed
    }
  }

  const before = stored();
  if (before === "dark" || before === "light") root.dataset.theme = before;

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const show = () => button.setAttribute("aria-pressed", String(isDark()));
    button.addEventListener("click", () => {
      choose(isDark() ? "light" : "dark");
      show();
    });
    system.addEventListener("change", show);
    show();
  });
})();
