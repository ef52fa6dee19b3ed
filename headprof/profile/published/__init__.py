"""Head scores in the forms in which papers publish them, a file each; `forms` lists them and tells them apart."""
