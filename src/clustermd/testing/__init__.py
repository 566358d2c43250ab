"""The public test kit: exerciser, judge, demo."""
