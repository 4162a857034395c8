"""What each quantisation costs: variants of a model measured against a reference, on the reference's own answers.

questions or a text (passages.py) -> reference, variants (run.py, swaps.py) -> figures (metrics.py)
                                  -> report.json (report.py), lines (table.py), report.html (page.py, plots.py)

What was measured is kept on disk (workspace.py), so that another variant costs only itself.
"""
