"""Fixtures shared by the tests: tiny models on disk, and a plain executor of captured graphs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import GraphModule
from torch.fx.node import map_aggregate

sys.path.insert(0, str(Path(__file__).parent))  # shared test code is imported by plain name

from golden_fixture import golden as golden
from golden_fixture import pytest_addoption as pytest_addoption
from whole_path import artifact as artifact
from whole_path import model_folder as model_folder
from whole_path import options as options
from whole_path import text_file as text_file

from liftc.checkpoint import Checkpoint
from liftc.program import Program, copy_graph, split_type
from liftc.spec import DTYPES


class GraphRunner:
    """Runs one graph of a program with torch on a device, reading weights from a checkpoint."""

    def __init__(self, program: Program, graph: str, checkpoint: Checkpoint, device: str = "cpu") -> None:
        place = torch.device(device)
        self.graph = copy_graph(program.graphs[graph])
        self.types = {n.name: n.meta["type"] for n in self.graph.nodes if n.op == "placeholder"}
        tensors: dict[str, torch.Tensor] = {}
        for node in self.graph.nodes:
            if node.op == "get_attr":
                name = str(node.target)
                node.target = "w_" + name.replace(".", "_")
                tensors[node.target] = checkpoint.tensor(name).to(place)
            node.args = map_aggregate(node.args, lambda a: place if isinstance(a, torch.device) else a)
            node.kwargs = map_aggregate(node.kwargs, lambda a: place if isinstance(a, torch.device) else a)
        self.module = GraphModule(tensors, self.graph)

    @torch.no_grad()
    def __call__(self, *inputs: torch.Tensor) -> Any:
        return self.module(*inputs)


class LanguageRunner:
    """Prefill and decode of a captured language model with a cache of `length` rows."""

    def __init__(self, program: Program, checkpoint: Checkpoint, length: int) -> None:
        self.prefill_graph = GraphRunner(program, "prefill", checkpoint)
        self.decode_graph = GraphRunner(program, "decode", checkpoint)
        self.caches = []
        for name, text in self.prefill_graph.types.items():
            if "_cache_" in name:
                dtype, dims = split_type(text)
                shape = [length if dim == "s" else int(dim) for dim in dims]
                # garbage where nothing is written yet: the mask must hide it
                self.caches.append(torch.full(shape, 7.0, dtype=DTYPES[dtype]))

    def prefill(self, ids: torch.Tensor, wanted: torch.Tensor | None = None, start: int = 0) -> torch.Tensor:
        """Logits (1, n, vocab) at `wanted` positions of ids (1, t); all of them by default."""
        positions = torch.arange(start, start + ids.shape[1])
        wanted = torch.arange(ids.shape[1]) if wanted is None else wanted
        return self.prefill_graph(ids, positions, wanted, *self.caches)

    def decode(self, token: int, position: int) -> torch.Tensor:
        """Logits (1, 1, vocab) after `token` at `position`."""
        return self.decode_graph(torch.tensor([[token]]), torch.tensor([position]), *self.caches)

    def greedy(self, ids: torch.Tensor, steps: int) -> list[int]:
        """Greedy continuation of ids (1, t)."""
        logits = self.prefill(ids, torch.tensor([ids.shape[1] - 1]))
        tokens = [int(logits[0, -1].argmax())]
        for step in range(steps - 1):
            tokens.append(int(self.decode(tokens[-1], ids.shape[1] + step)[0, -1].argmax()))
        return tokens


@pytest.fixture(scope="session")
def graph_runner() -> type[GraphRunner]:
    return GraphRunner


@pytest.fixture(scope="session")
def language_runner() -> type[LanguageRunner]:
    return LanguageRunner


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny_folder(family, **options of save_tiny) -> folder of a tiny model, made once per run."""
    from tiny_models import save_tiny

    made: dict[str, Path] = {}

    def make(family: str, **options: Any) -> Path:
        key = f"{family}-{sorted(options.items())}"
        if key not in made:
            made[key] = save_tiny(tmp_path_factory.mktemp("tiny") / family, family, **options)
        return made[key]

    return make


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of this test run's own, so that nothing from earlier runs is used."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIFTC_CACHE_DIR", str(folder))
        yield folder
