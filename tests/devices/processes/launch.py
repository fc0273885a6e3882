"""Starts the processes of one training, and ends them whatever happens."""

from collections.abc import Callable
import os
import pathlib
import socket
import subprocess
import sys
import time

from tests.devices.processes import training

ROOT = pathlib.Path(__file__).parents[3]
TIMEOUT = 600  # seconds: what takes twenty may take minutes on a busy machine
ATTEMPTS = 3

# How JAX and gRPC say that another program has taken the port since it was chosen.
_PORT_IS_TAKEN = ('Failed to start RPC server', 'No address added')


def launch(
  action: str,
  count: int,
  directory: pathlib.Path,
  *,
  until: Callable[[], bool] = lambda: False,
) -> None:
  """Runs ``training`` in some processes until all have ended.

  Args:
    action: the program's action.
    count: number of processes.
    directory: where they write, and where their output is kept.
    until: asked again and again; all processes are killed once it is true.

  Raises:
    RuntimeError: if a process fails or time is up, with the output of all; none of
      them is left behind.
  """
  for attempt in range(1, ATTEMPTS + 1):
    logs = [directory / f'{action}-{attempt}-{rank}.log' for rank in range(count)]
    problem = _launch_once(action, directory, logs, until)
    if problem is None:
      return
    output = '\n'.join(f'--- {log.name}\n{log.read_text()}' for log in logs)
    if attempt == ATTEMPTS or not any(sign in output for sign in _PORT_IS_TAKEN):
      raise RuntimeError(f'{action} with {count} processes: {problem}\n{output}')


def free_port() -> int:
  """A port of the loopback interface that nobody listens on."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def _launch_once(action, directory, logs, until):
  """None if all went well, or what did not."""
  processes, deadline, port = [], time.monotonic() + TIMEOUT, free_port()
  try:
    for rank, log in enumerate(logs):
      arguments = (rank, len(logs), port, directory, action)
      command = [sys.executable, '-m', training.__name__, *map(str, arguments)]
      with log.open('w') as output:
        processes.append(
          subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
          )
        )
    while not until():
      codes = [process.poll() for process in processes]
      if any(codes):
        return f'exit codes {codes}'
      if codes == [0] * len(codes):
        return None
      if time.monotonic() > deadline:
        return f'not done after {TIMEOUT} seconds'
      time.sleep(0.05)
    return None
  finally:
    for process in processes:
      process.kill()
    for process in processes:
      process.communicate()
