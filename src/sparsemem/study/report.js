const search = document.getElementById("search");
if (search) {
  const rows = [...document.querySelectorAll("#answers-table tbody tr")];
  const said = document.getElementById("found");
  search.closest("p").hidden = false;
  search.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\s+/);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
    said.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} shown`;
  });
}
const details = [...document.querySelectorAll("details")];
addEventListener("beforeprint", () => { for (const one of details) one.open = true; });
