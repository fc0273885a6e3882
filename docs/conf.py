"""How Sphinx builds these pages: ``make docs``, where every warning is an error."""

from importlib import metadata
import re

project = 'msam_optax'
author = 'the msam_optax authors'
version = release = metadata.version('msam-optax')

extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
html_theme = 'furo'
html_title = project

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


def _link_results_as_files(app, docname, source):
  """Offers the tables beside the benchmarks as files: they are not pages."""
  source[0] = re.sub(r'\]\((\.\./[^)]*\.md)\)', r'](path:\1)', source[0])


def setup(app):
  app.connect('missing-reference', _resolve_in_package)
  app.connect('source-read', _link_results_as_files)
