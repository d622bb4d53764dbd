"""Tables: each tool's medians, and how much better blkmirror is."""

# Field, heading, digits, and whether its ratio is shown and which way (1: less is better, -1: more is)

COPY_COLUMNS = [
    ("wall", "wall s", 2, 1),
    ("cpu", "CPU s", 2, 1),
    ("peak_mib", "peak MiB", 0, 0),
    ("target_mib", "target MiB", 0, 0),
]
SHAPE_COLUMNS = [*COPY_COLUMNS[:1], ("of_limit", "of the limit", 2, 0), *COPY_COLUMNS[1:]]
MAP_COLUMNS = COPY_COLUMNS[:3]
LOAD_COLUMNS = [
    ("per_s", "per s", 0, -1),
    ("mib_per_s", "MiB/s", 0, 0),
    ("p99_us", "p99 us", 0, 0),
    ("cpu_us", "CPU us each", 1, 1),
    ("peak_mib", "peak MiB", 0, 0),
]
GUEST_COLUMNS = [
    ("wall", "ready after s", 1, 1),
    ("ready", "is ready", 0, 0),
    ("copied", "times the disk", 2, 1),
    ("cpu", "CPU s", 1, 0),
    ("guest_mib_per_s", "guest MiB/s", 1, -1),
    ("p99_us", "p99 us", 0, 1),
]
GAP_COLUMNS = [
    ("wall", "pivoted after s", 2, 1),
    ("gap_ms", "longest write ms", 1, 1),
    ("cpu", "CPU s", 2, 0),
    ("guest_mib_per_s", "guest MiB/s", 1, -1),
    ("p99_us", "p99 us", 0, 0),
]


def print_table(title, results, columns):
    """Each tool's medians; behind a peer's, how much better the first tool is."""
    ours = next(iter(results.values()))
    heads = [title] + [head + (" (ratio)" if way else "") for _, head, _, way in columns]
    rows = []
    for tool, result in results.items():
        cells = [tool]
        for field, _, digits, way in columns:
            cell = f"{result[field]:.{digits}f}"
            if way and tool.split()[0] != "blkmirror":
                better, worse = (ours[field], result[field]) if way > 0 else (result[field], ours[field])
                cell += f" ({worse / better:.2f})" if better else " (-)"
            cells.append(cell)
        rows.append(cells)
    widths = [max(len(row[index]) for row in [heads, *rows]) for index in range(len(heads))]
    line = lambda cells: "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths)) + " |"
    print("\n" + line(heads))
    print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    for row in rows:
        print(line(row), flush=True)
