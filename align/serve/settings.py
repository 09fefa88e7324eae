"""What a server is started with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of one server.

    Attributes:
        runs: folder of the runs.
        host: address to listen on.
        port: port to listen on.
        models: base models by the name that clients give; the value is a folder or a hub id.
        hosts: host names besides ``localhost`` and addresses under which the server is reached.
        devices: sets of devices, each for one job at a time, as in ``CUDA_VISIBLE_DEVICES``;
            an empty text leaves the choice to torch.
        body_mib: largest request, except for files.
        file_mib: largest file, and largest part of an upload.
        command: words after Python's that run the recipe of a job.
        job_keys: changes of the recipes of jobs, ``METHOD.KEY=VALUE``, as after ``--set``.
        requests_per_minute: of one token.
        jobs_per_token: unfinished jobs of one token.
        token_gib: size of all files of one token.
        engine: what generates text: ``vllm``, ``hf`` (transformers), or ``auto``, which is vLLM
            where it is installed and fits the model.
        private_webhooks: allow webhooks to loopback and private addresses.
    """

    runs: Path = Path("runs")
    host: str = "127.0.0.1"
    port: int = 7860
    models: Mapping[str, str] = field(default_factory=dict)
    hosts: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("",)
    body_mib: int = 8
    file_mib: int = 512
    command: tuple[str, ...] = ("-m", "align", "run")
    job_keys: tuple[str, ...] = ()
    requests_per_minute: int = 1200
    jobs_per_token: int = 100
    token_gib: float = 50.0
    engine: str = "auto"
    private_webhooks: bool = False

    @property
    def data(self) -> Path:
        """Folder of what the server keeps besides the runs."""
        return self.runs / ".serve"


def own_address(settings: Settings) -> str:
    """Return the address under which programs of this machine reach the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"
