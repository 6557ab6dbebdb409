// The list of papers: rows that hold every word of the search.
document.addEventListener("DOMContentLoaded", () => {
  const box = document.getElementById("paper-filter");
  if (!box) return;
  const rows = [...document.querySelectorAll("table tbody tr")];
  box.addEventListener("input", () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
  });
});
