"""The best allowed mixture by the fitted surrogates, and whether it is better than the current one."""
