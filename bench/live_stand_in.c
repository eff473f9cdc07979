/* SocketCAN for programs on a machine whose kernel has none: UDP on the loopback interface carries the frames.
 *
 * LD_PRELOAD this. A socket of AF_CAN is one of UDP, and binding it to interface canN is binding it to port 20000+N.
 * Queue, stamps, counts of loss and recvmmsg are the kernel's own and alike; ids are not filtered. For bench/live.py.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <linux/can.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <netinet/in.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

enum { FIRST_INDEX = 1000, FIRST_PORT = 20000, FILES_MAX = 4096, SOL_CAN_RAW_ = 101 };

static int number_of[FILES_MAX]; /* of the interface a descriptor is bound to, plus 1 */

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int number(const char *name) { return strncmp(name, "can", 3) || !name[3] ? -1 : name[3] - '0'; }

int socket(int domain, int type, int protocol)
{
	if (domain != AF_CAN)
		return REAL(socket)(domain, type, protocol);
	return REAL(socket)(AF_INET, SOCK_DGRAM | (type & (SOCK_CLOEXEC | SOCK_NONBLOCK)), 0);
}

int bind(int fd, const struct sockaddr *address, socklen_t length)
{
	struct sockaddr_in there = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	int interface = ((const struct sockaddr_can *)address)->can_ifindex - FIRST_INDEX;

	if (address->sa_family != AF_CAN)
		return REAL(bind)(fd, address, length);
	there.sin_port = htons(FIRST_PORT + interface);
	if (fd < FILES_MAX)
		number_of[fd] = interface + 1;
	return REAL(bind)(fd, (struct sockaddr *)&there, sizeof(there));
}

int setsockopt(int fd, int level, int name, const void *value, socklen_t length)
{
	return level == SOL_CAN_RAW_ ? 0 : REAL(setsockopt)(fd, level, name, value, length);
}

int ioctl(int fd, unsigned long request, ...)
{
	va_list arguments;
	va_start(arguments, request);
	struct ifreq *interface = va_arg(arguments, void *);
	va_end(arguments);

	if (request == SIOCGIFNAME && interface->ifr_ifindex >= FIRST_INDEX) {
		snprintf(interface->ifr_name, IFNAMSIZ, "can%d", interface->ifr_ifindex - FIRST_INDEX);
		return 0;
	}
	if ((request == SIOCGIFINDEX || request == SIOCGIFFLAGS || request == SIOCGIFHWADDR || request == SIOCGIFMTU) &&
	    number(interface->ifr_name) >= 0) {
		if (request == SIOCGIFINDEX)
			interface->ifr_ifindex = FIRST_INDEX + number(interface->ifr_name);
		else if (request == SIOCGIFFLAGS)
			interface->ifr_flags = IFF_UP | IFF_RUNNING;
		else if (request == SIOCGIFHWADDR)
			interface->ifr_hwaddr.sa_family = ARPHRD_CAN;
		else
			interface->ifr_mtu = CANFD_MTU;
		return 0;
	}
	return REAL(ioctl)(fd, request, interface);
}

unsigned int if_nametoindex(const char *name)
{
	return number(name) >= 0 ? FIRST_INDEX + number(name) : REAL(if_nametoindex)(name);
}

ssize_t recvmsg(int fd, struct msghdr *message, int flags)
{
	static __typeof__(&recvmsg) real;
	socklen_t room = message->msg_namelen;

	if (!real)
		real = REAL(recvmsg);
	ssize_t count = real(fd, message, flags);
	if (count >= 0 && fd < FILES_MAX && number_of[fd] && message->msg_name && room >= sizeof(struct sockaddr_can)) {
		struct sockaddr_can *from = message->msg_name;
		memset(from, 0, sizeof(*from));
		from->can_family = AF_CAN;
		from->can_ifindex = FIRST_INDEX + number_of[fd] - 1;
		message->msg_namelen = sizeof(*from);
	}
	return count;
}
