"""The README and the pages of ``docs/``: code that runs as pasted, and sound links."""

import inspect
import pathlib
import re
import typing

import optax
import pytest

import msam_optax
from msam_optax import Combination
from msam_optax import Metric
from tests.methods import public_methods

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md']
PAGES += sorted(ROOT.glob('docs/**/*.md'))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def code_blocks(page):
  """Blocks of Python, with the line each begins at, those in comments included."""
  text = page.read_text()
  for block in re.finditer(r'^```python\n(.*?)^```$', text, re.S | re.M):
    yield text[: block.start(1)].count('\n'), block[1]


def run(page):
  """Runs a page's blocks one after the other, as a reader pastes them."""
  namespace = {}
  for line, block in code_blocks(page):
    # Line numbers of the page, in tracebacks.
    exec(compile('\n' * line + block, page, 'exec'), namespace)
  return namespace


def anchors(page):
  """The anchors of a page's headings, by the rule of code hosts and of MyST."""
  text = re.sub(r'^```.*?^```$', '', page.read_text(), flags=re.S | re.M)
  for heading in re.findall(r'^#+ (.*)$', text, re.M):
    yield re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')


@pytest.mark.standard_promotion
def test_readme_code_trains():
  namespace = run(ROOT / 'README.md')
  assert namespace['loss'] < 1e-3
  assert namespace['nnx_loss'] > 0


@pytest.mark.slow
@pytest.mark.standard_promotion
@pytest.mark.parametrize(
  'page', [p for p in PAGES[1:] if '```python' in p.read_text()], ids=lambda p: p.name
)
def test_code_of_page_runs(page):
  run(page)


@pytest.mark.parametrize('page', PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
  text = re.sub(r'^```.*?^```$', '', page.read_text(), flags=re.S | re.M)
  for target in re.findall(r'\]\(([^)\s]+)\)', text):
    if target.startswith(('https://', 'http://')):
      continue
    path, _, anchor = target.partition('#')
    linked = (page.parent / path).resolve() if path else page
    assert linked.exists(), target
    assert linked.is_relative_to(ROOT), target
    if anchor:
      assert anchor in set(anchors(linked)), target


def test_readme_fits_a_page():
  text = (ROOT / 'README.md').read_text()
  assert len(text.splitlines()) <= 130
  assert len(text.split()) <= 1000


def test_every_recipe_is_on_the_pages():
  folder = ROOT / 'docs' / 'recipes'
  index, code = ((folder / f'{page}.md').read_text() for page in ('index', 'code'))
  for recipe in folder.glob('*.py'):
    assert f'[{recipe.stem}]({recipe.name})' in index
    assert f'## {recipe.stem}\n\n```{{include}} {recipe.name}\n' in code


def test_every_result_is_on_a_page():
  page = (ROOT / 'docs' / 'results.md').read_text()
  for result in (ROOT / 'benchmarks' / 'results').iterdir():
    if result.suffix in ('.md', '.png'):
      assert f'## {result.stem}\n' in page
      assert f'../benchmarks/results/{result.name}' in page


def test_every_public_name_is_in_the_reference():
  reference = (ROOT / 'docs' / 'api.md').read_text()
  for name in msam_optax.__all__:
    assert re.search(rf'^\.\. [\w:]+:: {name}(\(|$)', reference, re.M), name


def test_every_metric_combination_and_method_has_its_formula():
  page = (ROOT / 'docs' / 'methods.md').read_text()
  kinds = Metric, Combination, optax.GradientTransformationExtraArgs
  for name in msam_optax.__all__:
    made = typing.get_type_hints(getattr(msam_optax, name)).get('return')
    if made in kinds:
      assert f'`{name}(' in page, name


def test_signatures_in_the_reference_are_those_of_the_methods():
  """Sphinx cannot read the defaults of the methods, so the page gives them."""
  reference = (ROOT / 'docs' / 'api.md').read_text()
  given = re.findall(r'autofunction:: (\w+)\((.*), \*\*options\)$', reference, re.M)
  assert {name for name, _ in given} >= set(public_methods()) - {'sharpness_aware'}
  for name, arguments in given:
    written = inspect.signature(eval(f'lambda {arguments}: None', vars(msam_optax)))
    actual = inspect.signature(getattr(msam_optax, name)).parameters
    names = [n for n in actual if n not in msam_optax.Options.__annotations__]
    assert list(written.parameters) == names, name
    for parameter in written.parameters.values():
      default = actual[parameter.name].default
      assert parameter.kind == actual[parameter.name].kind
      assert type(parameter.default) is type(default)
      if not isinstance(default, msam_optax.Metric):
        assert parameter.default == default, (name, parameter)
