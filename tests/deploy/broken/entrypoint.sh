#!/bin/sh
# An unquoted expansion, which shellcheck must name.
exec tritonserver --model-repository=$REPOSITORY $FLAGS
