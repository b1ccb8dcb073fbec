"""A graph cut into units: residual blocks, and what lies between them layer by layer."""

import operator
from dataclasses import dataclass, field
from itertools import takewhile

from torch import fx, nn

from dfkd.compress.graph import is_layer
from dfkd.compress.tracing import Mark
from dfkd.errors import UserError


@dataclass
class Unit:
    """Nodes that are reconstructed together: one layer with what follows it, or a block that one tensor enters and one
    leaves."""

    name: str
    nodes: list[fx.Node] = field(default_factory=list)

    @property
    def read(self) -> bool:
        """Whether anything takes what it gives: nothing does of a head for training alone, or of checks of a shape."""
        return any(user not in self.nodes for node in self.nodes for user in node.users)


def units(graph: fx.GraphModule) -> list[Unit]:
    """The graph cut wherever a single tensor goes on: residual blocks, and what lies between them layer by layer.

    A cut without a layer of its own (a ReLU, a pooling) belongs to the unit before it. Of several tensors that a
    network gives, those within may go on too; behind the first that does not (a head of several) nothing is in a unit.
    """
    nodes = [node for node in graph.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    place = {node: k for k, node in enumerate(nodes)}
    given = {node for node in nodes if any(user.op == "output" for user in node.users)}
    last = {node: max((place.get(user, k) for user in node.users), default=k) for node, k in place.items()}
    if given:
        last[max(given, key=place.__getitem__)] = len(nodes)
    found: list[Unit] = []
    current: list[fx.Node] = []
    alive = [node for node in graph.graph.nodes if node.op == "placeholder"]
    last |= {node: max((place.get(user, -1) for user in node.users), default=-1) for node in alive}
    for k, node in enumerate(nodes):
        alive = [each for each in [*alive, node] if last[each] > k]
        current.append(node)
        if len(alive) > 1 or _is_tuple(node) or any(each in given and each not in alive for each in current):
            continue
        layers = [str(each.target) for each in current if is_layer(graph, each, nn.Conv2d, nn.Linear)]
        if layers or not found or any(each in given for each in found[-1].nodes):
            found.append(Unit(_common(layers), current))
        else:
            found[-1].nodes += current
        current = []
    return found


def _is_tuple(node: fx.Node) -> bool:
    """Whether a node gives several tensors, to be told apart by number: a chunk, a split."""
    return bool(node.users) and all(
        user.target is operator.getitem and isinstance(user.args[1], int) for user in node.users
    )


def _common(names: list[str]) -> str:
    """The longest path that all names begin with: `layer1.0` of `layer1.0.conv1` and `layer1.0.conv2`."""
    parts = [name.split(".") for name in names]
    if not parts:
        return "input"
    shared = list(takewhile(lambda same: len(set(same)) == 1, zip(*parts)))
    return ".".join(same[0] for same in shared) or f"{names[0]} to {names[-1]}"


def extract(graph: fx.GraphModule, nodes: list[fx.Node], name: str) -> tuple[fx.GraphModule, fx.Node, fx.Node]:
    """Some of a graph's nodes as a module of their own (sharing the layers), its input node and its output node there.

    Raises UserError where the nodes take or give more than one tensor.
    """
    inside = set(nodes)
    sources = list(dict.fromkeys(i for node in nodes for i in node.all_input_nodes if i not in inside))
    fixed = [node for node in sources if node.op == "get_attr"]
    sources = [node for node in sources if node.op != "get_attr"]
    sinks = [node for node in nodes if any(user not in inside for user in node.users)]
    if len(sources) != 1 or len(sinks) != 1:
        raise UserError(f"{name} has {len(sources)} inputs and {len(sinks)} outputs where a unit has one of each")
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {sources[0]: part.placeholder("x")}
    for node in [*fixed, *nodes]:
        copies[node] = part.node_copy(node, lambda old: copies[old])
    part.output(copies[sinks[0]])
    return fx.GraphModule(graph, part), sources[0], sinks[0]


def mark(graph: fx.GraphModule) -> list[str]:
    """Put a Mark behind every unit but the last, in place, so that its output can be watched by name; the
    names."""
    names = []
    for k, unit in enumerate(units(graph)[:-1]):
        ends = [node for node in unit.nodes if any(user not in unit.nodes for user in node.users)]
        if not ends:
            continue
        names.append(f"hint{k}")
        graph.add_submodule(names[-1], Mark())
        end = ends[-1]  # behind it nothing may come but what is not read: a check of a size
        with graph.graph.inserting_after(end):
            marker = graph.graph.call_module(names[-1], (end,))
        for user in [user for user in end.users if user is not marker]:
            user.replace_input_with(end, marker)
    graph.recompile()
    return names
