"""`deca report`: what one or several runs did, as one HTML file that needs no network.

reading.py reads a run's folder (records.py); tables.py, figures.py and curves.py show it, and page.py joins these.
"""
