"""A workflow file of the browser as one flat graph: subgraphs are put in the place of the nodes that stand for them.

A node inside is called by the ids on the way to it ("696:484"), as ComfyUI calls it; a link likewise.
"""

from __future__ import annotations

from typing import Any

BYPASSED, MUTED = 4, 2


class FlatWorkflow:
    """The nodes by id, each with the names of its links, and what every link brings.

    Attributes:
        nodes: as in the file, but for `inputs` whose links are named across the whole workflow.
        links: the node and slot that a link begins at.
    """

    def __init__(self, workflow: dict[str, Any]):
        self.nodes: dict[str, dict] = {}
        self.links: dict[str, tuple[str, int]] = {}
        self._same: dict[str, str | None] = {}  # a link into a subgraph, and the one outside that goes on in it
        self._kinds = {kind["id"]: kind for kind in workflow.get("definitions", {}).get("subgraphs", ())}
        self._outputs: dict[tuple[str, int], str] = {}  # of a node that stands for a subgraph: the link inside
        self._promoted: dict[str, tuple[str, int]] = {}  # a link from a widget of a node that stands for a subgraph
        self._add(workflow, "", None)

    def source(self, link: str | None) -> tuple[str, int] | None:
        """The node and slot that a link begins at; None where it leads nowhere."""
        while link in self._same:
            link = self._same[link]
        if link is None or link not in self.links:
            return None
        begin = self.links[link]
        return self.source(self._outputs[begin]) if begin in self._outputs else begin

    def promoted(self, link: str | None) -> tuple[dict, str] | None:
        """The node and widget inside that hold the value of a link from a subgraph's own widget."""
        while link in self._same and link not in self._promoted:
            link = self._same[link]
        if link not in self._promoted:
            return None
        links = [other for other, place in self._promoted.items() if place == self._promoted[link]]
        held = ((n, i["widget"]["name"]) for n in self.nodes.values() for i in n["inputs"] if _holds(i, links))
        return next(held, None)

    def _add(self, graph: dict, path: str, stands: dict | None) -> None:
        inputs = {i["name"]: i["link"] for i in stands["inputs"]} if stands else {}
        for link in map(_fields, graph["links"]):
            number, origin, slot, target, place = link
            if stands and origin == graph["inputNode"]["id"]:
                outer = inputs.get(graph["inputs"][slot]["name"])
                self._same[f"{path}{number}"] = outer
                if outer is None:
                    self._promoted[f"{path}{number}"] = (path, slot)
            else:
                self.links[f"{path}{number}"] = (f"{path}{origin}", slot)
            if stands and target == graph["outputNode"]["id"]:
                self._outputs[path.removesuffix(":"), place] = f"{path}{number}"
        for node in graph["nodes"]:
            name = f"{path}{node['id']}"
            slots = [
                {**i, "link": None if i.get("link") is None else f"{path}{i['link']}"} for i in node.get("inputs", ())
            ]
            flat = {**node, "id": name, "inputs": slots}
            if node["type"] in self._kinds and active(node):
                self._add(self._kinds[node["type"]], f"{name}:", flat)
            else:
                self.nodes[name] = flat


def active(node: dict) -> bool:
    return node.get("mode", 0) not in (BYPASSED, MUTED)


def _holds(slot: dict, links: list[str]) -> bool:
    return slot["link"] in links and bool(slot.get("widget"))


def _fields(link: list | dict) -> tuple[int, int, int, int, int]:
    """Number, origin, its slot, target, its slot."""
    if isinstance(link, dict):
        return tuple(link[key] for key in ("id", "origin_id", "origin_slot", "target_id", "target_slot"))
    return tuple(link[:5])
