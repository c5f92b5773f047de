"""Where healthy ends: the cut-offs of the views in `queries`, for the colours of dashboards.

The alert rules in `stack/prometheus/rules` have the same ones. A test compares all three.
"""

SPIKE_SIGMAS = 6
"""Standard deviations of the loss above its recent mean (`spikes`)."""
EDGE_ONSET = 0.9
"""Sharpness as a share of its threshold (`edge_of_stability`)."""
ENTROPY_COLLAPSE = 0.05
"""Normalized entropy of attention (`entropy_collapse`)."""
LOGIT_BOUND = 50
"""Largest attention logit, nats (`logit_growth`)."""
DEAD_RMS = 1e-6
"""RMS of activations (`dead_layers`)."""
DEAD_ZEROS = 0.999
"""Share of exact zeros among activations (`dead_layers`)."""
RANK_LOSS = 0.5
"""Effective rank over what it was, or over that of the embedding (`rank_collapse`)."""
ANISOTROPY = 0.5
"""Mean cosine similarity of distinct tokens (`rank_collapse`)."""
UPDATE_FAST = 1e-2
"""Update norm over weight norm of a layer (`update_ratios`)."""
