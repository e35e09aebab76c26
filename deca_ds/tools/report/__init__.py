"""`deca report`: what one or several runs did, as one HTML file that needs no network."""
