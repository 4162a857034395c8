// The theme that was chosen, before anything is drawn; without a choice the system's.
try {
  const chosen = localStorage.getItem("phisight-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch { /* a browser that keeps nothing */ }
