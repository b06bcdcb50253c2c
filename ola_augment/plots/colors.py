"""Colours that the colour-blind can tell apart."""

#: Around the start: brown is less than at the start, teal more.
DIVERGING = "BrBG"
#: Okabe and Ito's, for what has no order.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
