"""Preference files made, judged, filtered and mixed: `cwdpo-bench negatives`."""
