"""To experiment trackers: histograms, scalars, findings and maps, sent once each, afterwards or while it trains."""
