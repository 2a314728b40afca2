"""Tables of a page that a click on a column's head sorts: `<table class="sortable">`, and a few lines of script.

A cell sorts by its `data-v`, or by its text; cells without a value come last whichever way. Rows of a `tfoot` stay.
"""

STYLE = """<style>
table.sortable th { cursor: pointer; user-select: none; }
table.sortable th[data-order]::after { content: " ↑"; } table.sortable th[data-order="-1"]::after { content: " ↓"; }
</style>"""

SCRIPT = """<script>
document.querySelectorAll("table.sortable").forEach(table => {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.onclick = () => {
    const order = head.dataset.order === "1" ? -1 : 1;
    heads.forEach(other => delete other.dataset.order);
    head.dataset.order = order;
    const value = row => row.cells[column].dataset.v ?? row.cells[column].textContent;
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a), y = value(b), none = (x === "") - (y === "");
      if (none || x === "") return none;
      return order * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
    });
    body.append(...rows);
  });
});
</script>"""


def cell_value(value: float | None) -> str:
    """Return the attribute that a number sorts by."""
    return f' data-v="{"" if value is None else value}"'
