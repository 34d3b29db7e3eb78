"""Tables, figures and the page that evaluated systems are shown in."""
