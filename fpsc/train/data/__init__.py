"""The clips that a model is trained on: `open_source`, then `order`, then batches by step."""

from fpsc.train.data.fits import check_fits
from fpsc.train.data.order import Order, order, prefetched
from fpsc.train.data.sample import Batch, Sample, Source, collate
from fpsc.train.data.spec import Data, open_source

__all__ = [
    "Batch",
    "Data",
    "Order",
    "Sample",
    "Source",
    "check_fits",
    "collate",
    "open_source",
    "order",
    "prefetched",
]
