/* SPDX-License-Identifier: Apache-2.0 */
/* Traffic that knows whether it was served: see `packetstack-traffic serve|run --help`. */
#include "protocol.h"

int main(int argc, char **argv)
{
	if (argc > 1 && !strcmp(argv[1], "serve"))
		return serve(argc - 1, argv + 1);
	if (argc > 1 && !strcmp(argv[1], "run"))
		return run(argc - 1, argv + 1);
	errx(2, "use `packetstack-traffic serve` or `packetstack-traffic run` (--help tells the options)");
}
