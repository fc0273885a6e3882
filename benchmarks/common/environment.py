"""What a result was measured with."""

from importlib import metadata
import os
import platform

import jax


def describe() -> dict[str, str | int]:
  """Device, processor cores and versions, to be stored beside every result."""
  packages = ('jax', 'jaxlib', 'optax', 'flax', 'msam-optax')
  return {
    'device': jax.devices()[0].device_kind,
    'platform': jax.default_backend(),
    'machine': platform.machine(),
    'cores': os.cpu_count() or 1,
    'python': platform.python_version(),
    **{name: version(name) for name in packages},
  }


def version(package: str) -> str:
  """The installed version; a clone can be run without being installed."""
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return 'not installed'
