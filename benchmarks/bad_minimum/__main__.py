"""Figure 6 of the paper: out of a bad global minimum, or not.

Run `python -m benchmarks.bad_minimum`. A small residual net is first driven to a bad
minimum: it fits rightly labelled pictures of clothes, all of them, and as many other
pictures with wrong labels. From there it is fine-tuned on the right ones, at a small
learning rate, with SGD, SAM and Monge SAM. Controls: SAM with the mean radius that
Monge SAM has really had, and LE-SAM, whose radius is Monge SAM's with a hard edge.

Every finished run is stored at once: after a kill the same command goes on from there.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console

from benchmarks.bad_minimum.figure import draw
from benchmarks.bad_minimum.findings import findings
from benchmarks.bad_minimum.report import best_rhos
from benchmarks.bad_minimum.report import NARROW
from benchmarks.bad_minimum.report import report
from benchmarks.bad_minimum.runs import experiment
from benchmarks.bad_minimum.settings import FULL
from benchmarks.bad_minimum.settings import QUICK
from benchmarks.bad_minimum.settings import SMOKE
from benchmarks.common import storage as store
from benchmarks.common.environment import describe
from benchmarks.common.progress import progress_bar
from benchmarks.common.tables import markdown
from benchmarks.common.tables import show

RESULTS = Path(__file__).parents[1] / 'results'
SETTINGS = {'quick': QUICK, 'full': FULL, 'smoke': SMOKE}


def main(argv: list[str] | None = None) -> None:
  """Runs what is missing, prints table and findings, writes numbers and picture."""
  parser = argparse.ArgumentParser(
    prog='python -m benchmarks.bad_minimum',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  size = parser.add_mutually_exclusive_group()
  size.add_argument('--full', action='store_true', help='larger: hours on two cores')
  size.add_argument('--smoke', action='store_true', help='tiny: only to see it run')
  parser.add_argument('--out', type=Path, default=RESULTS, help='where results go')
  parser.add_argument(
    '--runs', type=Path, help='where finished runs are kept (OUT/bad_minimum_runs)'
  )
  args = parser.parse_args(argv)
  name = 'full' if args.full else 'smoke' if args.smoke else 'quick'
  settings = SETTINGS[name]
  told = {'environment': describe(), 'setting': name, 'settings': settings._asdict()}
  folder = store.folder_for(args.runs or args.out / 'bad_minimum_runs', name, settings)
  total = len(settings.seeds) * (3 + 4 * len(settings.rhos))
  with progress_bar() as progress:
    task = progress.add_task('', total=total, completed=-1)

    def tell(text):
      progress.update(task, description=text, advance=1)

    results = {**told, **experiment(settings, folder, tell)}
  results['best'] = best_rhos(results['rows'])
  results['findings'] = findings(results)
  args.out.mkdir(parents=True, exist_ok=True)
  stem = args.out / ('bad_minimum_full' if args.full else 'bad_minimum')
  paths = {kind: stem.with_suffix(f'.{kind}') for kind in ('png', 'md', 'json')}
  paths['json'].write_text(json.dumps(results, indent=1) + '\n')
  paths['md'].write_text(markdown(report(results)))
  draw(results, paths['png'])
  console = Console()
  show(report(results, NARROW), console)
  for path in paths.values():
    console.print(f'Written: {path}', highlight=False)


if __name__ == '__main__':
  main()
