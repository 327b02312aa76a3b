"""Processes for tests, forked from servers that have the imports behind them: what is run is a program as text.

A fresh interpreter takes 15 to 30 seconds of CPU time for torch, transformers and this package. So `run` and `start` do
what `subprocess.run` and `subprocess.Popen` do with `[sys.executable, "-c", program, *arguments]`, but in a fork of a
process that has imported already

- "package" (the default): `openvla`, `openvla.training`, `openvla.serving` and what a run imports;
- "transformers": what the package imports of the libraries, but not the package;
- "libraries": torch, torchvision, timm and SciPy; neither transformers nor `openvla`.

Everything else is as in a fresh interpreter: arguments, environment, working folder, output, exit code, signals. Only
taking the interpreter apart, 2 seconds of CPU time, is left out, after what `atexit` has to do. Where
the interpreter is what is tested (what is imported, the console script, an environment variable that is read while
importing), take `subprocess` and `sys.executable`.

conftest.py starts the servers once, for all test workers; each imports when it is first asked.
"""

import atexit
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import types
from contextlib import suppress
from importlib import import_module


SERVERS = {
    "libraries": ("torch", "torchvision", "timm", "scipy.optimize"),
    "transformers": (
        "transformers.image_processing_utils",
        "transformers.modeling_utils",
        "transformers.models.auto.processing_auto",
        "transformers.models.llama.modeling_llama",
        "transformers.tokenization_utils_tokenizers",
        "matplotlib.pyplot",
        "matplotlib.backends.backend_agg",
    ),
    "package": (
        "openvla.training",
        "openvla.serving.server",
        "pyarrow.dataset",
        "h5py",
        "av",
    ),
}
FOLDER = "OPENVLA_TEST_PROCESSES"  # environment variable: where the sockets of the servers are
# While libraries are imported: bitsandbytes asks torch to compile four of its functions then, and torch imports its
# code generators, two seconds. They run as they are written instead, and on a CPU hardly ever.
NO_COMPILER = {"TORCHDYNAMO_DISABLE": "1"}


class Process:
    """A running program; `pid` is also the id of its process group."""

    def __init__(self, program: str, arguments: tuple, server="package", stdout=None, cwd=None, env=None):
        self.program, self.returncode = [program, *map(str, arguments)], None
        self._outputs = [tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")]
        job = {"program": self.program, "cwd": str(cwd or os.getcwd()), "env": dict(os.environ if env is None else env)}
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.connect(f"{os.environ[FOLDER]}/{server}")
        out, err = (file.fileno() for file in self._outputs)
        socket.send_fds(self._connection, [json.dumps(job).encode()], [out if stdout is None else stdout, err])
        self.pid = int(self._connection.recv(20))

    def running(self) -> bool:
        return self.returncode is None and not select.select([self._connection], [], [], 0)[0]

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, negative for a signal. Raises TimeoutError after `timeout` seconds."""
        if self.returncode is None:
            self._connection.settimeout(timeout)
            self.returncode = int(self._connection.recv(20))
            self._connection.close()
        return self.returncode

    def done(self, timeout: float | None = None) -> subprocess.CompletedProcess:
        """Exit code and output. Raises TimeoutError after `timeout` seconds."""
        self.wait(timeout)
        for file in self._outputs:
            file.seek(0)
        return subprocess.CompletedProcess(self.program, self.returncode, *(file.read() for file in self._outputs))

    def kill(self) -> None:
        """kill -9 of the process and of what it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()


def start(program: str, *arguments, **more) -> Process:
    """Begin a program.

    Args:
        more: server: see above. stdout: a file descriptor instead of `done().stdout`. cwd, env: as of `subprocess`.
    """
    return Process(program, arguments, **more)


def run(program: str, *arguments, timeout: float = 3000, **more) -> subprocess.CompletedProcess:
    """Run a program to its end; see `start`. Raises TimeoutError."""
    return _all_done([start(program, *arguments, **more)], timeout)[0]


def run_ranks(program: str, *arguments, timeout: float = 3000, **more) -> list[subprocess.CompletedProcess]:
    """Run two processes of `torch.distributed`, with the environment and the store that torchrun gives them. A failed
    one does not end the other, which torchrun would do. Raises TimeoutError."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    common |= {"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_RUN_ID": "tests"}
    ranks = [{**common, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    return _all_done([start(program, *arguments, env=env, **more) for env in ranks], timeout)


def _all_done(processes: list[Process], timeout: float) -> list[subprocess.CompletedProcess]:
    try:
        return [process.done(timeout) for process in processes]
    finally:
        for process in processes:
            if process.running():
                process.kill()


def start_servers(folder: str) -> subprocess.Popen:
    """The process of the servers, whose sockets are in `folder`; it ends with its standard input."""
    command = [sys.executable, os.path.abspath(__file__), folder]
    servers = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert servers.stdout is not None and servers.stdout.readline() == b"listening\n"
    return servers


# What the servers do


def serve(listeners: list[tuple[socket.socket, tuple[str, ...]]]) -> dict:
    """Fork for each request; later listeners are served by a fork that goes on to import. Returns the job in the forks
    that are to do one."""
    (own, modules), *later = listeners
    waiting: list = [sys.stdin, own, *(listener for listener, _ in later)]
    if sys.stdin in select.select(waiting, [], [])[0]:  # nobody has asked
        os._exit(0)
    os.environ.update(NO_COMPILER)  # of the jobs the environment is another
    for module in modules:
        with suppress(ImportError):  # of an extra; who needs it finds out
            import_module(module)
    gc.collect()
    gc.freeze()  # what has been imported stays: forks do not look through it, nor copy it
    while True:
        ready = select.select(waiting, [], [])[0]
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if sys.stdin in ready:
            os._exit(0)
        if own not in ready:
            if os.fork() == 0:
                own.close()
                return serve(later)
            waiting, later = [sys.stdin, own], []
            continue
        connection = own.accept()[0]
        if os.fork() == 0:
            return supervise(connection)
        connection.close()


def supervise(connection: socket.socket) -> dict:
    """Fork once more: one process does the job, the other says how that ended."""
    message, (stdout, stderr), _, _ = socket.recv_fds(connection, 2**20, 2)
    pid = os.fork()
    with suppress(OSError):  # by both, that it is so when either goes on
        os.setpgid(pid, pid or os.getpid())
    if pid:
        connection.send(str(pid).encode())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        try:
            connection.send(str(code).encode())
        finally:
            os._exit(0)
    connection.close()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for given, own in ((stdout, 1), (stderr, 2)):
        os.dup2(given, own)
        os.close(given)
    job = json.loads(message)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    if modules := sys.modules.get("transformers.dynamic_module_utils"):  # it has read the variable
        vars(modules)["HF_MODULES_CACHE"] = job["env"].get("HF_MODULES_CACHE", vars(modules)["HF_MODULES_CACHE"])
    sys.argv = ["-c", *job["program"][1:]]
    return job


def execute(program: str, codes: list[int]) -> None:
    """Run a program as the main module and append its exit code."""
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    try:
        exec(compile(program, "<string>", "exec"), main.__dict__)
        codes.append(0)
    except SystemExit as exit:
        numbered = isinstance(exit.code, int | None)
        if not numbered:
            print(exit.code, file=sys.stderr)
        codes.append((exit.code or 0) if numbered else 1)
    except Exception:
        sys.excepthook(*sys.exc_info())
        codes.append(1)


def end(codes: list[int]) -> None:
    """The last that `atexit` does: it is the first to be registered."""
    if codes:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(codes[0] & 0xFF)


if __name__ == "__main__":
    codes: list[int] = []
    atexit.register(end, codes)
    made = []
    for name, modules in SERVERS.items():
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(f"{sys.argv[1]}/{name}")
        listener.listen()
        made.append((listener, modules))
    print("listening", flush=True)
    sys.path[0] = ""
    execute(serve(made)["program"][0], codes)
