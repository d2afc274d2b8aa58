"""Reconstruction: what layers made of the channels that went, got back from those that stay.

The parts that ThiNet, LASSO channel pruning and ``Reconstructed`` share, in the order in which they
use each other:

- ``readers``: the layers that are linear in patches of their input, and these patches as rows;
- ``sums``: where a reader's output is added to other tensors (residual branches);
- ``targets``: the original network's responses, kept while they fit;
- ``moments``: Gram matrices of the rows, streamed over the data;
- ``solve``, ``ranking``: least squares from Gram matrices; scores from an order;
- ``problem``: the same for whole channels of a group, over all of its readers;
- ``scoring``: scores for every group from the dense network;
- ``sequence``: the pass through the network, reader after reader, that chooses and solves;
- ``least_squares``: what LASSO channel pruning and ``Reconstructed`` do on it.
"""

from __future__ import annotations
