"""Numbers -> matplotlib figures. No files, no pyplot, no global state.

Every function takes numbers and returns a new Figure. Colours are safe for colour-blind eyes.
"""
