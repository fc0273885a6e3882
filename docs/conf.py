"""How Sphinx builds these pages: ``make docs``, where every warning is an error."""

from importlib import import_module
from importlib import metadata
import inspect
import re

from docutils import nodes
from latex2mathml import converter

project = 'msam_optax'
author = copyright = 'the msam_optax authors'
version = release = metadata.version('msam-optax')

extensions = [
  'myst_nb',
  'sphinx.ext.autodoc',
  'sphinx.ext.napoleon',
  'sphinx.ext.viewcode',
]
html_theme = 'furo'
html_title = project
html_math_renderer = 'mathml'  # Browsers know it: no script that comes from elsewhere.
pygments_dark_style = 'monokai'  # Furo's own underlines modules, as if they were links.

# A test runs the notebooks; the pages show what is stored in them.
nb_execution_mode = 'off'
myst_enable_extensions = ['dollarmath']

# Links to a heading, `scale.md#micro-batches`, resolve as they do on a code host.
myst_heading_anchors = 3

# The docstrings describe every argument and field: signatures show names and defaults,
# and a field is not repeated as a member.
autodoc_typehints = 'none'
autodoc_preserve_defaults = True
autodoc_member_order = 'bysource'
napoleon_attr_annotations = False
napoleon_use_ivar = True
add_module_names = False

# A reference that leads nowhere is a warning, except to the pages of other projects.
nitpicky = True
nitpick_ignore_regex = [('py:.*', r'(optax|flax)\..*')]


def _resolve_in_package(app, env, node, contnode):
  """Finds ``:func:`perturb``` in the docstring of a submodule: names of the package."""
  return env.get_domain('py').resolve_xref(
    env,
    node['refdoc'],
    app.builder,
    node.get('reftype'),
    f'msam_optax.{node["reftarget"]}',
    node,
    contnode,
  )


def _name_defaults_as_users_do(app, what, name, obj, options, signature, returns):
  """Writes ``euclidean()`` for ``metrics.euclidean()``, which the source has."""
  if signature:
    return re.sub(r'\b(metrics|combinations|spaces)\.', '', signature), returns


def _skip_fields(app, what, name, obj, skip, options):
  """Leaves out the members of named tuples and dataclasses that Python makes."""
  made = type(obj).__name__ == '_tuplegetter' or name == 'replace'
  return skip or made


def _summarize(app, docname, source):
  """Puts a table before each section of the reference: every name, and what it does."""
  if docname == 'api':
    source[0] = re.sub(
      r'(?<=```{eval-rst}\n).*?(?=```)', _summary, source[0], flags=re.S
    )


def _summary(section):
  path, *_ = re.findall(r':: (msam_optax\S*)$', section[0], re.M)
  module = import_module(path)
  names = re.findall(r'^\.\. auto\w+:: (\w+)(?:\(|$)', section[0], re.M)
  names = names or [
    name
    for name, value in vars(module).items()
    if getattr(value, '__module__', '') == path and not name.startswith('_')
    if inspect.isroutine(value) or inspect.isclass(value)
  ]
  rows = [
    f'   * - :py:obj:`~{path}.{name}`\n     - {_first_line(getattr(module, name))}'
    for name in names
  ]
  head = f'.. currentmodule:: {path}\n\n.. list-table::\n   :widths: 1 3\n\n'
  return head + '\n'.join(rows) + f'\n\n{section[0]}'


def _first_line(thing):
  return (inspect.getdoc(thing) or '').partition('\n')[0]


def _link_files(app, docname, source):
  """Leads to the pages that show a file, where a code host would show the file."""
  results = r'(?<!!)(\[[^\]]*\])\((?:\.\./benchmarks/)?results/(\w+)\.(?:md|png)\)'
  text = re.sub(results, r'\1(/results.md#\2)', source[0])
  notebooks = r'\[([^\]]*)\]\(\.\./notebooks/(\w+)\.ipynb\)'
  text = re.sub(notebooks, r'{doc}`\1 </notebooks/\2>`', text)
  text = text.replace('](../CONTRIBUTING.md', '](contributing.md')
  text = text.replace('](../benchmarks/README.md', '](benchmarks.md')
  source[0] = re.sub(r'\]\(((?:recipes/)?)(\w+)\.py\)', r'](\1code.md#\2)', text)


def _read_included(app, path, docname, source):
  """Reads a recipe as its docstring, which is Markdown, and its code."""
  if path.suffix == '.py':
    _, docstring, code = re.split(r'"""\n*', source[0], maxsplit=2)
    source[0] = f'{docstring}\n\n```python\n{code}```\n'
  _link_files(app, docname, source)


def _link_pictures(app, doctree):
  """Makes each picture a link to itself: its labels are small at a page's width."""
  if app.env.docname.startswith('notebooks/'):
    return  # These were drawn for a page.
  for image in doctree.findall(lambda node: node.tagname == 'image'):
    image['width'] = '100%'


def _math(display, html):
  def visit(translator, node):
    translator.body.append(html % converter.convert(node.astext(), display=display))
    raise nodes.SkipNode

  return visit, None


def setup(app):
  block = '<div style="padding: 0.5em 0">%s</div>'  # Else it has a scroll bar.
  app.add_html_math_renderer('mathml', _math('inline', '%s'), _math('block', block))
  app.connect('missing-reference', _resolve_in_package)
  app.connect('autodoc-process-signature', _name_defaults_as_users_do)
  app.connect('autodoc-skip-member', _skip_fields)
  app.connect('source-read', _summarize)
  app.connect('source-read', _link_files)
  app.connect('include-read', _read_included)
  app.connect('doctree-read', _link_pictures)
