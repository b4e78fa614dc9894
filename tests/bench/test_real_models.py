"""The page on real models shows the committed runs, all of them and nothing else."""

from pathlib import Path

from abft.experiments.report_tables import experiment_tables, overview_table
from abft.experiments.results import Results

ROOT = Path(__file__).parents[2]


def test_the_page_shows_the_committed_runs():
    results = Results(ROOT / "bench" / "results" / "real-smollm2")
    assert len(results.runs) == len(results.content["runs"])
    assert len(list(results.folder.glob("runs/*/run.json"))) == len(results.runs)
    page = (ROOT / "docs" / "real-models.md").read_text(encoding="utf-8")
    own = {table.name.removeprefix(f"{results.folder.name}-"): table for table in experiment_tables(results)}
    for table in (overview_table([results]), own["against-vanilla"], own["heads"]):
        rows = table.markdown().split("\n\n")[0]
        assert rows in page, table.name
