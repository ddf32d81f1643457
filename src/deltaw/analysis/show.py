"""The report on an adapter as a person reads it."""

from deltaw.analysis.inspect import LayerReport, Report


def text(report: Report, limit: int | None = None) -> str:
    """Return a table of layers and what is wrong with them; paths are shown as given."""
    lines = []
    if report.layers:
        width = max(len(layer.path) for layer in report.layers)
        share = "" if report.layers[0].relative is None else "ΔW/W"
        head = f"{'layer':<{width}}  {'kind':<9}  rank  scale    norm ΔW  {share}"
        lines.append(head.rstrip())
        lines += [_row(layer, width) for layer in report.layers[:limit]]
    if report.copies:
        total = sum(copy.parameters for copy in report.copies)
        names = [copy.path for copy in report.copies]
        shown = ", ".join(names[:4]) + (f", ... ({len(names)})" if len(names) > 4 else "")
        lines.append(f"trained in full: {shown}: {total:,} parameters")
    lines.append(f"{len(report.layers)} adapted layers, {report.parameters:,} parameters")
    if report.dead:
        lines.append(f"dead (ΔW is zero): {', '.join(report.dead)}")
    if report.broken:
        lines.append(f"NaN or Inf in: {', '.join(report.broken)}")
    return "\n".join(lines)


def _row(layer: LayerReport, width: int) -> str:
    relative = "" if layer.relative is None else f"{layer.relative:6.2%}"
    mark = "  NaN or Inf" if layer.broken else "  dead" if layer.dead else ""
    return (
        f"{layer.path:<{width}}  {layer.kind:<9}  {layer.r:>4}  {layer.scale:<5.3g}  "
        f"{layer.norm:>9.3f}  {relative}{mark}"
    ).rstrip()
