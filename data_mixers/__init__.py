"""Which share of which task: designs, surrogates, proposals and the plan that plays a mixture exactly."""
