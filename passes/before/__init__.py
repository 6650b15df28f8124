"""Pass: what stands in front of a site's queries and keys, so that the op can do it itself.

Models normalise queries and keys and rotate them, in many spellings: by complex numbers, by
interleaved or half-split pairs, before or after heads are split, for the video alone or for all
tokens, written into slices. Here these calls are not matched but read. Each value between the
projection and the attention is described by

- where its elements come from: every axis of it is made of digits of axes of one tensor, the leaf
  (`digits`);
- what was done to them: a 2 x 2 matrix of tables for each pair of channels (`matrix`).

`value` has both, and what views, sums, products, joins and writes make of them; `reader` reads the
calls of a graph, `norm` those that are a norm. A call that is not understood is a leaf itself,
hence whatever comes out is right: what is in front of a leaf stays as it is. A norm is a leaf of
which the rest is known. At the attention, `layout` says where heads and channels are in the
leaves, `rope` what tables of cos and sin the matrices are made of, and `fronts` puts together what
the op is to do (`front`), or the reason why it does nothing.
"""

from fpsc.passes.before.front import Front, RopeTable, Source
from fpsc.passes.before.fronts import Fronts

__all__ = ["Front", "Fronts", "RopeTable", "Source"]
