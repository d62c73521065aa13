"""What is changed in a graph before torch makes C++ of it; see `wamrl.planners.running.compiled`."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph

aten = torch.ops.aten


class BiasApart(CustomGraphPass):
    """On a CPU a linear layer is a product and then a sum, which torch joins with what follows, such as a relu.

    As one call, `addmm` first copies the bias to every row of its result, which in small layers takes as long as the
    product.
    """

    def __call__(self, graph: Graph) -> None:
        """Replace every plain `addmm`; numbers of 16 bits, which would be rounded twice, stay as they are."""
        for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
            value = node.meta["val"]
            if node.kwargs or value.device.type != "cpu" or value.dtype not in (torch.float32, torch.float64):
                continue
            bias, first, second = node.args
            with graph.inserting_before(node):
                product = graph.call_function(aten.mm.default, (first, second))
                total = graph.call_function(aten.add.Tensor, (product, bias))
            product.meta.update(node.meta)
            total.meta.update(node.meta)
            node.replace_all_uses_with(total)
            graph.erase_node(node)

    def uuid(self) -> Any:
        """What torch's cache of compiled code knows this pass by."""
        return get_hash_for_files((__file__,))
