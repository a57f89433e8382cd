"""Reports of runs and studies: one HTML file that needs nothing else, Markdown, PNG and CSV."""
