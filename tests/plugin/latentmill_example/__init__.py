"""An example of a package that extends Latentmill: one module for each thing that it adds."""
