"""The verifier: a table of rules, each a sentence and a check; a broken rule is quoted with its node.

    verify: graph decode: sign_matmul %7: packed shape must be [ceil(out/32), lifted_features]: expected
    i32[18,1386], found i32[18,1400]

Rules live in liftc/rules_graph.py (any graph), rules_lift.py (lift ops) and rules_tables.py (tables).
"""

from __future__ import annotations

from collections import defaultdict

from torch.fx import Graph, Node

from liftc.errors import VerifyError
from liftc.program import Program
from liftc.rules import Context, NodeRule
from liftc.rules_graph import GRAPH_RULES
from liftc.rules_lift import LIFT_RULES
from liftc.rules_tables import TABLE_RULES
from liftc.text import node_text

NODE_RULES: tuple[NodeRule, ...] = (*GRAPH_RULES, *LIFT_RULES)

_SHOWN = 400


def _by_op() -> dict[str, list[NodeRule]]:
    table: dict[str, list[NodeRule]] = defaultdict(list)
    for rule in NODE_RULES:
        for op in rule.ops:
            table[op].append(rule)
    return dict(table)


_RULES = _by_op()


def verify(program: Program) -> None:
    """Check every rule; raises VerifyError quoting the first that is broken."""
    for name, graph in program.graphs.items():
        _verify_graph(Context(program, name), graph)
    for rule in TABLE_RULES:
        for entry, details in rule.check(program):
            raise VerifyError(f"verify: {entry}: {rule.sentence}: {details}")


def _verify_graph(context: Context, graph: Graph) -> None:
    outputs = [node for node in graph.nodes if node.op == "output"]
    last = next(iter(reversed(graph.nodes)), None)
    if len(outputs) != 1 or outputs[0] is not last:
        found = f"{len(outputs)} outputs, the last node being {last}"
        raise VerifyError(f"verify: graph {context.graph}: exactly one output ends a graph: found {found}")
    for node in graph.nodes:
        for key in ("*", node.op, str(node.target)) if node.op == "call_function" else ("*", node.op):
            for rule in _RULES.get(key, ()):
                details = rule.check(context, node)
                if details is not None:
                    raise VerifyError(_message(context, node, rule.sentence, details))
        context.seen.add(node)
        context.names.add(node.name)
        context.calls += node.op == "call_function"


def _message(context: Context, node: Node, sentence: str, details: str) -> str:
    op = str(node.target).split(".")[1] if str(node.target).count(".") == 2 else str(node.target)
    what = op if node.op == "call_function" else node.op
    text = node_text(node)
    shown = text if len(text) <= _SHOWN else text[:_SHOWN] + " ..."
    return f"verify: graph {context.graph}: {what} %{node.name}: {sentence}: {details}; the node is {shown}"
